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
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { LIMIT_US = 10000000, MAX_RUNS = 10000, MAX_GETS = 100000 };

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

/* Connects as soon as somebody listens. */
static int connect_to(const char *path, double limit)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    for (;;) {
        const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0)
            die("socket");
        if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0)
            return fd;
        close(fd);
        if (now() > limit)
            die("no API");
    }
}

/* Asks, and waits for an answer of this status, whose body is in the same piece. */
static void ask(int fd, const char *status, const char *method, const char *path, const char *body)
{
    char text[8192];
    const int length = body == NULL
        ? snprintf(text, sizeof text, "%s %s HTTP/1.1\r\nHost: x\r\n\r\n", method, path)
        : snprintf(text, sizeof text, "%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: %zu\r\n\r\n%s", method, path,
                   strlen(body), body);
    if (write(fd, text, length) != length)
        die("write");
    ssize_t got = 0;
    do {
        const ssize_t more = read(fd, text + got, sizeof text - 1 - got);
        if (more <= 0)
            die("read");
        got += more;
        text[got] = 0;
    } while (strstr(text, "\r\n\r\n") == NULL);
    if (strncmp(text + 9, status, 3) != 0) {
        fprintf(stderr, "%s %s: %s\n", method, path, text);
        exit(2);
    }
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print(const char *name, double *values, int count)
{
    qsort(values, count, sizeof *values, ascending);
    printf("%s %.0f %.0f %.0f\n", name, values[0], values[count / 2], values[count * 9 / 10]);
}

int main(int argc, char **argv)
{
    static double answers[MAX_RUNS + 1], starts[MAX_RUNS + 1], gets[MAX_GETS];
    const int runs = argc > 6 ? atoi(argv[1]) : 0, count = argc > 6 ? atoi(argv[2]) : 0;
    if (runs < 1 || runs > MAX_RUNS || count < 100 || count > MAX_GETS) {
        fputs("usage: api RUNS GETS SOCKET KERNEL ARGS PROGRAM [ARGUMENT...]\n", stderr);
        return 2;
    }
    const char *path = argv[3];
    char boot[4096];
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
        ask(fd, "200", "GET", "/", NULL);
        answers[i] = now() - begin;
        ask(fd, "204", "PUT", "/boot-source", boot);
        begin = now();
        ask(fd, "204", "PUT", "/actions", "{\"action_type\":\"InstanceStart\"}");
        starts[i] = now() - begin;
        for (int get = 0; i == runs && get < count; get++) {
            begin = now();
            ask(fd, "200", "GET", "/", NULL);
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
