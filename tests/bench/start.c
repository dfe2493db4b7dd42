/*
 * Measures from just before a program's start to the first byte it writes to a pipe.
 *
 *   start RUNS [NAME COMMAND... ';']...
 *
 * The cases take turns, so that a busy moment of the machine falls on all of them alike. For each one a line:
 *   NAME RUNS FAILED MIN MEDIAN P90 END        times in microseconds; END is the median to the process's end
 * A run that writes nothing within 5 s, or ends with another status than 0, is a failed one.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { LIMIT_MS = 5000, MAX_CASES = 32, MAX_RUNS = 10000 };

struct series {
    char *name, **command;
    int ok, failed;
    double *first, *end;
};

extern char **environ;

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

static void die(const char *what)
{
    perror(what);
    exit(2);
}

static void run(struct series *series)
{
    int output[2], status = -1;
    if (pipe2(output, O_CLOEXEC) < 0)
        die("pipe");
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&actions, output[1], STDOUT_FILENO);
    pid_t child;
    const double start = now();
    if (posix_spawn(&child, series->command[0], &actions, NULL, series->command, environ) != 0)
        die(series->command[0]);
    close(output[1]);
    char byte;
    struct pollfd poll_for = {.fd = output[0], .events = POLLIN};
    const int got = poll(&poll_for, 1, LIMIT_MS) == 1 && read(output[0], &byte, 1) == 1;
    const double first = now() - start;
    /* To its end, or to the limit: what it still writes does not matter. */
    char rest[256];
    while (poll(&poll_for, 1, LIMIT_MS) == 1 && read(output[0], rest, sizeof rest) > 0)
        ;
    if (!got)
        kill(child, SIGKILL);
    waitpid(child, &status, 0);
    const double end = now() - start;
    close(output[0]);
    posix_spawn_file_actions_destroy(&actions);
    if (got && status == 0) {
        series->first[series->ok] = first;
        series->end[series->ok++] = end;
    } else {
        series->failed++;
    }
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    static struct series all[MAX_CASES];
    const int runs = argc > 1 ? atoi(argv[1]) : 0;
    int cases = 0;
    for (int i = 2; i + 1 < argc && cases < MAX_CASES; i++) {
        struct series *series = &all[cases++];
        series->name = argv[i++];
        series->command = &argv[i];
        while (i < argc && strcmp(argv[i], ";") != 0)
            i++;
        if (i < argc)
            argv[i] = NULL;
    }
    if (runs < 1 || runs > MAX_RUNS || cases == 0) {
        fputs("usage: start RUNS [NAME COMMAND... ';']...\n", stderr);
        return 2;
    }
    for (int c = 0; c < cases; c++) {
        all[c].first = calloc(runs, sizeof(double));
        all[c].end = calloc(runs, sizeof(double));
        if (all[c].first == NULL || all[c].end == NULL)
            die("calloc");
        run(&all[c]); /* warms the page cache; not counted */
        all[c].ok = all[c].failed = 0;
    }
    for (int i = 0; i < runs; i++)
        for (int c = 0; c < cases; c++)
            run(&all[c]);
    for (int c = 0; c < cases; c++) {
        struct series *s = &all[c];
        qsort(s->first, s->ok, sizeof(double), ascending);
        qsort(s->end, s->ok, sizeof(double), ascending);
        if (s->ok > 0)
            printf("%s %d %d %.0f %.0f %.0f %.0f\n", s->name, s->ok, s->failed, s->first[0], s->first[s->ok / 2],
                   s->first[s->ok * 9 / 10], s->end[s->ok / 2]);
        else
            printf("%s 0 %d - - - -\n", s->name, s->failed);
    }
    return 0;
}
