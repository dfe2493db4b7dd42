/* A client of the API's, and figures: what the programs of this folder that measure it share. */
#pragma once

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

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

/* Asks, and waits for an answer of this status, whose body is in the same piece; all of it is in `text` then. */
static void ask(int fd, const char *status, const char *method, const char *path, const char *body, char *text, size_t size)
{
    const int length = body == NULL
        ? snprintf(text, size, "%s %s HTTP/1.1\r\nHost: x\r\n\r\n", method, path)
        : snprintf(text, size, "%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: %zu\r\n\r\n%s", method, path,
                   strlen(body), body);
    if (write(fd, text, length) != length)
        die("write");
    ssize_t got = 0;
    do {
        const ssize_t more = read(fd, text + got, size - 1 - got);
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
