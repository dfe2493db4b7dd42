// The guest's side of the network load: runs one job against `peer` for half a second and prints what came of it.
// usage: net ADDRESS to-guest|from-guest (bytes per second) | packets-to-guest|packets-from-guest (packets per second that
//        arrived) | ping (median of 200 round trips of an ICMP echo, microseconds)
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "wire.h"

static const double PERIOD = 0.5;
static char buffer[CHUNK];
static struct sockaddr_in peer = {.sin_family = AF_INET};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int begin(char job)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    peer.sin_port = htons(PORT);
    if (connect(fd, (struct sockaddr *)&peer, sizeof peer) || write(fd, &job, 1) != 1)
        err(1, "no peer");
    return fd;
}

static int packet_socket(void)
{
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(PACKET_PORT)};
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (bind(fd, (struct sockaddr *)&own, sizeof own))
        err(1, "bind");
    return fd;
}

static void answer(int fd, void *to, size_t len)
{
    if (recv(fd, to, len, MSG_WAITALL) != (ssize_t)len)
        errx(1, "the peer does not answer");
}

static double to_guest(void)
{
    int fd = begin(JOB_SEND);
    double t, from = now() + 0.1, first = 0;
    uint64_t bytes = 0;
    ssize_t n;
    while ((t = now()) < from + PERIOD) {
        if ((n = read(fd, buffer, sizeof buffer)) <= 0)
            err(1, "the peer has stopped");
        if (t < from)
            continue;
        if (!first)
            first = t;
        bytes += n;
    }
    return bytes / (t - first);
}

static double from_guest(void)
{
    int fd = begin(JOB_RECEIVE);
    double from = now();
    uint64_t bytes;
    while (now() < from + PERIOD)
        if (write(fd, buffer, sizeof buffer) < 0)
            err(1, "write");
    shutdown(fd, SHUT_WR);
    answer(fd, &bytes, sizeof bytes);
    return bytes / (now() - from);
}

static double packets_to_guest(void)
{
    int packets = packet_socket(), fd = begin(JOB_SEND_PACKETS);
    struct pollfd wait = {.fd = packets, .events = POLLIN};
    double t, from = now() + 0.1;
    uint64_t count = 0;
    while ((t = now()) < from + PERIOD) {
        poll(&wait, 1, 100);
        // By the dozen, as a clock is read for each round.
        for (int i = 0; i < 16 && recv(packets, buffer, sizeof buffer, MSG_DONTWAIT) >= 0; i++)
            count += t >= from;
    }
    close(fd);
    return count / (t - from);
}

static double packets_from_guest(void)
{
    int packets = packet_socket(), fd = begin(JOB_COUNT_PACKETS);
    char go;
    answer(fd, &go, 1);
    peer.sin_port = htons(PACKET_PORT);
    double t, from = now();
    while ((t = now()) < from + PERIOD)
        for (int i = 0; i < 16; i++)
            sendto(packets, buffer, PACKET, 0, (struct sockaddr *)&peer, sizeof peer);
    shutdown(fd, SHUT_WR);
    uint64_t count;
    answer(fd, &count, sizeof count);
    return count / (t - from);
}

static uint16_t checksum(const void *data, size_t len)
{
    const uint16_t *words = data;
    uint32_t sum = 0;
    for (size_t i = 0; i < len / 2; i++)
        sum += words[i];
    sum = (sum & 0xffff) + (sum >> 16);
    return ~(sum + (sum >> 16));
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double ping(void)
{
    enum { COUNT = 200 };
    static double times[COUNT];
    int fd = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
    struct { struct icmphdr head; char data[56]; } echo = {.head = {.type = ICMP_ECHO}};
    struct timeval limit = {.tv_sec = 5};
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit))
        err(1, "raw socket");
    echo.head.un.echo.id = htons(getpid());
    for (int i = 0; i < COUNT; i++) {
        echo.head.un.echo.sequence = htons(i);
        echo.head.checksum = 0;
        echo.head.checksum = checksum(&echo, sizeof echo);
        double from = now();
        if (sendto(fd, &echo, sizeof echo, 0, (struct sockaddr *)&peer, sizeof peer) < 0)
            err(1, "sendto");
        struct icmphdr *reply;
        do {
            ssize_t n = recv(fd, buffer, sizeof buffer, 0);
            if (n < (ssize_t)(sizeof(struct iphdr) + sizeof *reply))
                err(1, "no answer");
            reply = (struct icmphdr *)(buffer + 4 * ((struct iphdr *)buffer)->ihl);
        } while (reply->type != ICMP_ECHOREPLY || reply->un.echo.id != echo.head.un.echo.id ||
                 reply->un.echo.sequence != echo.head.un.echo.sequence);
        times[i] = now() - from;
        // Apart, so that each finds a guest at rest.
        usleep(1000);
    }
    qsort(times, COUNT, sizeof *times, by_size);
    return times[COUNT / 2] * 1e6;
}

int main(int argc, char **argv)
{
    static const struct { const char *name; double (*run)(void); } jobs[] = {
        {"to-guest", to_guest},
        {"from-guest", from_guest},
        {"packets-to-guest", packets_to_guest},
        {"packets-from-guest", packets_from_guest},
        {"ping", ping},
    };
    if (argc != 3 || inet_pton(AF_INET, argv[1], &peer.sin_addr) != 1)
        errx(2, "usage: net ADDRESS JOB");
    for (size_t i = 0; i < sizeof jobs / sizeof *jobs; i++)
        if (!strcmp(argv[2], jobs[i].name)) {
            printf("%.0f\n", jobs[i].run());
            return 0;
        }
    errx(2, "no such job: %s", argv[2]);
}
