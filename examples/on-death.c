/* Print what becomes of virtual machines, and run a program whenever one dies:
 *
 *     on-death [--user] [PROGRAM]
 *
 * PROGRAM gets the VM's object, the reason and the status. When the service is restarted, this goes
 * on, and hears of deaths that the service owes; of one in the moment of a crash perhaps twice.
 *
 *     cc on-death.c -o on-death $(pkg-config --cflags --libs libsystemd)
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <systemd/sd-bus.h>
#include <unistd.h>

#define BUS "org.freedesktop.DBus"
#define SERVICE "org.vmbus1"
#define VM SERVICE ".VirtualMachine"
#define OWNER "type='signal',sender='" BUS "',member='NameOwnerChanged',arg0='" SERVICE "'"
#define DIED "type='signal',sender='" SERVICE "',interface='" VM "',member='Died'"
#define CHANGED "type='signal',sender='" SERVICE "',member='PropertiesChanged',arg0='" VM "'"

static const char *program;
static char owner[256]; /* the connection that is the service; empty while there is none */

static int check(int result)
{
    if (result < 0) {
        fprintf(stderr, "on-death: %s\n", strerror(-result));
        exit(EXIT_FAILURE);
    }
    return result;
}

/* Anybody may send us a signal that looks like the service's. */
static int is_from_service(sd_bus_message *m)
{
    return strcmp(sd_bus_message_get_sender(m), owner) == 0;
}

static int on_owner(sd_bus_message *m, void *data, sd_bus_error *error)
{
    const char *name, *before, *now;
    (void)data, (void)error;
    check(sd_bus_message_read(m, "sss", &name, &before, &now));
    snprintf(owner, sizeof owner, "%s", now);
    puts(*now ? "the service is here" : "the service is gone");
    return 0;
}

static int on_died(sd_bus_message *m, void *data, sd_bus_error *error)
{
    const char *path = sd_bus_message_get_path(m), *reason;
    uint32_t cid;
    int32_t status;
    (void)data, (void)error;
    if (!is_from_service(m))
        return 0;
    check(sd_bus_message_read(m, "usi", &cid, &reason, &status));
    printf("%s died: %s %d\n", path, reason, status);
    if (program && fork() == 0) {
        char number[16];
        snprintf(number, sizeof number, "%d", status);
        execlp(program, program, path, reason, number, NULL);
        _exit(127);
    }
    int ended = 0;
    if (program && (wait(&ended) < 0 || ended))
        fprintf(stderr, "on-death: %s failed\n", program);
    return 0;
}

static int on_changed(sd_bus_message *m, void *data, sd_bus_error *error)
{
    const char *name, *state;
    (void)data, (void)error;
    if (!is_from_service(m))
        return 0;
    check(sd_bus_message_skip(m, "s"));
    check(sd_bus_message_enter_container(m, 'a', "{sv}"));
    while (check(sd_bus_message_enter_container(m, 'e', "sv"))) {
        check(sd_bus_message_read(m, "s", &name));
        if (strcmp(name, "State") == 0) {
            check(sd_bus_message_read(m, "v", "s", &state));
            printf("%s is %s\n", sd_bus_message_get_path(m), state);
        } else {
            check(sd_bus_message_skip(m, "v"));
        }
        check(sd_bus_message_exit_container(m));
    }
    return 0;
}

int main(int argc, char **argv)
{
    int user = argc > 1 && strcmp(argv[1], "--user") == 0;
    sd_bus *bus = NULL;
    sd_bus_creds *creds = NULL;
    const char *name = "";
    program = argv[1 + user];
    setvbuf(stdout, NULL, _IOLBF, 0);
    check(user ? sd_bus_open_user(&bus) : sd_bus_open_system(&bus));
    check(sd_bus_add_match(bus, NULL, OWNER, on_owner, NULL));
    check(sd_bus_add_match(bus, NULL, DIED, on_died, NULL));
    check(sd_bus_add_match(bus, NULL, CHANGED, on_changed, NULL));
    /* The service may not be there yet. */
    if (sd_bus_get_name_creds(bus, SERVICE, SD_BUS_CREDS_UNIQUE_NAME, &creds) >= 0)
        check(sd_bus_creds_get_unique_name(creds, &name));
    snprintf(owner, sizeof owner, "%s", name);
    sd_bus_creds_unref(creds);
    puts("listening");
    for (;;)
        if (check(sd_bus_process(bus, NULL)) == 0)
            check(sd_bus_wait(bus, UINT64_MAX));
}
