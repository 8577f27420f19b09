#!/bin/sh
# Run a command whenever a virtual machine dies:
#
#     on-death [--system | --session] COMMAND...
#
# The command gets three more arguments: the VM's object, the reason and the status.
# gdbus goes on when the service is restarted, and so does this.

set -eu

bus=--system
case ${1-} in
--system | --session)
	bus=$1
	shift
	;;
esac
if [ $# -eq 0 ]; then
	echo "usage: on-death [--system | --session] COMMAND..." >&2
	exit 2
fi

# A line of it: /org/vmbus1/vm/1: org.vmbus1.VirtualMachine.Died (uint32 2048, 'killed', -9)
died="^\(/org/vmbus1/vm/[0-9]*\): org\.vmbus1\.VirtualMachine\.Died (uint32 [0-9]*, '\([a-z-]*\)', \(-*[0-9]*\))$"

gdbus monitor "$bus" --dest org.vmbus1 | while read -r line; do
	case $line in
	"The name org.vmbus1 is owned by "*) echo "on-death: listening" >&2 ;;
	esac
	# What anything else says never looks like that, since a line begins with the object's path.
	death=$(printf '%s\n' "$line" | sed -n "s|$died|\1 \2 \3|p")
	if [ -n "$death" ]; then
		# The words are known to have no spaces in them.
		# shellcheck disable=SC2086
		"$@" $death </dev/null || echo "on-death: $1 failed with status $?" >&2
	fi
done
