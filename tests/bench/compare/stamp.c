// Runs a command and writes each line of its output with the milliseconds from before the process existed.
// usage: stamp COMMAND [ARG...]
//
// The last line is `exit STATUS`, stamped when the process is gone.
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

int main(int argc, char **argv)
{
    int out[2], status;
    pid_t pid;
    posix_spawn_file_actions_t actions;
    if (argc < 2)
        errx(2, "usage: stamp COMMAND [ARG...]");
    if (pipe(out))
        err(1, "pipe");
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, out[1], 1);
    posix_spawn_file_actions_addclose(&actions, out[0]);
    posix_spawn_file_actions_addclose(&actions, out[1]);
    setvbuf(stdout, NULL, _IOLBF, 0);

    double begin = now();
    if ((errno = posix_spawnp(&pid, argv[1], &actions, NULL, argv + 1, environ)))
        err(1, "%s", argv[1]);
    close(out[1]);
    char chunk[4096];
    ssize_t n;
    int fresh = 1;
    while ((n = read(out[0], chunk, sizeof chunk)) > 0) {
        double at = now() - begin;
        for (ssize_t i = 0; i < n; i++) {
            if (chunk[i] == '\r')
                continue;
            if (fresh)
                printf("%.1f ", at);
            putchar(chunk[i]);
            fresh = chunk[i] == '\n';
        }
    }
    if (waitpid(pid, &status, 0) < 0)
        err(1, "waitpid");
    printf("%s%.1f exit %d\n", fresh ? "" : "\n", now() - begin,
           WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    return 0;
}
