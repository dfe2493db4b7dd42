// The other side of the guest's network card: serves one job at a time, until killed. usage: peer ADDRESS
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "wire.h"

static char buffer[CHUNK];

static int bound(int type, int port, const char *address)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)};
    int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0), one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (inet_pton(AF_INET, address, &at.sin_addr) != 1 || bind(fd, (struct sockaddr *)&at, sizeof at))
        err(1, "cannot listen at %s:%d", address, port);
    return fd;
}

// The guest has closed its sending side, or all of it.
static int over(int fd)
{
    char byte;
    ssize_t n = recv(fd, &byte, 1, MSG_DONTWAIT | MSG_PEEK);
    return n == 0 || (n < 0 && errno != EAGAIN);
}

static uint64_t count_packets(int fd, int packets)
{
    uint64_t count = 0;
    struct pollfd wait[2] = {{.fd = fd, .events = POLLIN}, {.fd = packets, .events = POLLIN}};
    while (recv(packets, buffer, sizeof buffer, MSG_DONTWAIT) >= 0)
        ; // what an earlier job left
    if (write(fd, "", 1) != 1)
        return 0; // tells the guest to begin
    for (;;) {
        poll(wait, 2, 1000);
        while (recv(packets, buffer, sizeof buffer, MSG_DONTWAIT) >= 0)
            count++;
        if (wait[0].revents)
            return count;
    }
}

static void serve(int fd, int packets, struct sockaddr_in guest)
{
    char job;
    uint64_t count = 0;
    ssize_t n;
    if (read(fd, &job, 1) != 1)
        return;
    switch (job) {
    case JOB_SEND:
        while (send(fd, buffer, sizeof buffer, MSG_NOSIGNAL) > 0)
            ;
        break;
    case JOB_RECEIVE:
        while ((n = read(fd, buffer, sizeof buffer)) > 0)
            count += n;
        send(fd, &count, sizeof count, MSG_NOSIGNAL);
        break;
    case JOB_SEND_PACKETS:
        guest.sin_port = htons(PACKET_PORT);
        while (!over(fd))
            for (int i = 0; i < 32; i++)
                sendto(packets, buffer, PACKET, 0, (struct sockaddr *)&guest, sizeof guest);
        break;
    case JOB_COUNT_PACKETS:
        count = count_packets(fd, packets);
        send(fd, &count, sizeof count, MSG_NOSIGNAL);
        break;
    }
}

int main(int argc, char **argv)
{
    if (argc != 2)
        errx(2, "usage: peer ADDRESS");
    memset(buffer, 0x5a, sizeof buffer);
    int listener = bound(SOCK_STREAM, PORT, argv[1]), packets = bound(SOCK_DGRAM, PACKET_PORT, argv[1]);
    if (listen(listener, 8))
        err(1, "listen");
    for (;;) {
        struct sockaddr_in guest;
        socklen_t len = sizeof guest;
        int fd = accept(listener, (struct sockaddr *)&guest, &len);
        if (fd < 0)
            err(1, "accept");
        serve(fd, packets, guest);
        close(fd);
    }
}
