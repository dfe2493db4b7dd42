/*
 * Measures a monitor's API over its unix socket.
 *
 *   api RUNS GETS SOCKET KERNEL ARGS PROGRAM [ARGUMENT...]
 *
 * Each run starts PROGRAM (its ARGUMENTs name SOCKET), asks `GET /` until it is answered, describes a VM that boots
 * KERNEL with ARGS, starts it, and ends the program. In the last one, `GET /` is asked GETS times more while the VM
 * runs. Prints, in microseconds:
 *   answer MIN MEDIAN P90      from just before the program's start to the first answer
 *   start MIN MEDIAN P90       InstanceStart, from the request to its answer
 *   get P50 P99
 */
#define _GNU_SOURCE
#include "client.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

enum { LIMIT_US = 10000000, MAX_RUNS = 10000, MAX_GETS = 100000 };

extern char **environ;

int main(int argc, char **argv)
{
    static double answers[MAX_RUNS + 1], starts[MAX_RUNS + 1], gets[MAX_GETS];
    const int runs = argc > 6 ? atoi(argv[1]) : 0, count = argc > 6 ? atoi(argv[2]) : 0;
    if (runs < 1 || runs > MAX_RUNS || count < 100 || count > MAX_GETS) {
        fputs("usage: api RUNS GETS SOCKET KERNEL ARGS PROGRAM [ARGUMENT...]\n", stderr);
        return 2;
    }
    const char *path = argv[3];
    char boot[4096], answer[8192];
    snprintf(boot, sizeof boot, "{\"kernel_image_path\":\"%s\",\"boot_args\":\"%s\"}", argv[4], argv[5]);
    /* The first run warms the page cache, and is not counted. */
    for (int i = 0; i <= runs; i++) {
        unlink(path);
        posix_spawn_file_actions_t actions;
        posix_spawn_file_actions_init(&actions);
        posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
        posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
        pid_t child;
        double begin = now();
        if (posix_spawn(&child, argv[6], &actions, NULL, argv + 6, environ) != 0)
            die(argv[6]);
        const int fd = connect_to(path, begin + LIMIT_US);
        ask(fd, "200", "GET", "/", NULL, answer, sizeof answer);
        answers[i] = now() - begin;
        ask(fd, "204", "PUT", "/boot-source", boot, answer, sizeof answer);
        begin = now();
        ask(fd, "204", "PUT", "/actions", "{\"action_type\":\"InstanceStart\"}", answer, sizeof answer);
        starts[i] = now() - begin;
        for (int get = 0; i == runs && get < count; get++) {
            begin = now();
            ask(fd, "200", "GET", "/", NULL, answer, sizeof answer);
            gets[get] = now() - begin;
        }
        close(fd);
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        posix_spawn_file_actions_destroy(&actions);
    }
    print("answer", answers + 1, runs);
    print("start", starts + 1, runs);
    qsort(gets, count, sizeof *gets, ascending);
    printf("get %.0f %.0f\n", gets[count / 2], gets[count * 99 / 100]);
    unlink(path);
    return 0;
}
