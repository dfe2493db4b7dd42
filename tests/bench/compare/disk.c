// Reads or writes a block device past the guest's page cache for half a second, and prints how fast that went.
// usage: disk DEVICE read|write sequential|random DEPTH BLOCK [TOTAL]
//
// DEPTH requests of BLOCK bytes are in flight at any time (Linux AIO). With TOTAL it moves that many bytes instead and
// prints the seconds. Else it prints requests per second, over half a second that begins after a tenth of one.
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MAX_DEPTH = 128 };
static const double PERIOD = 0.5;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static struct {
    int fd, opcode, random;
    size_t block;
    uint64_t blocks, next;
} job;

// The same sequence of places in every run (xorshift64).
static uint64_t place(void)
{
    static uint64_t x = 0x9e3779b97f4a7c15;
    if (!job.random)
        return job.next++ % job.blocks * job.block;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return x % job.blocks * job.block;
}

static void submit(aio_context_t context, struct iocb *request, void *buffer)
{
    memset(request, 0, sizeof *request);
    request->aio_lio_opcode = job.opcode;
    request->aio_fildes = job.fd;
    request->aio_buf = (uintptr_t)buffer;
    request->aio_nbytes = job.block;
    request->aio_offset = place();
    request->aio_data = request->aio_buf;
    if (syscall(SYS_io_submit, context, 1, &request) != 1)
        err(1, "io_submit");
}

int main(int argc, char **argv)
{
    if (argc < 6 || argc > 7)
        errx(2, "usage: disk DEVICE read|write sequential|random DEPTH BLOCK [TOTAL]");
    int writes = !strcmp(argv[2], "write"), depth = atoi(argv[4]);
    uint64_t size, total = argc > 6 ? strtoull(argv[6], NULL, 10) : 0;
    job.opcode = writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
    job.random = !strcmp(argv[3], "random");
    job.block = strtoull(argv[5], NULL, 10);
    if (depth < 1 || depth > MAX_DEPTH || !job.block)
        errx(2, "DEPTH is 1 to %d, BLOCK not 0", MAX_DEPTH);
    job.fd = open(argv[1], (writes ? O_RDWR : O_RDONLY) | O_DIRECT);
    if (job.fd < 0 || ioctl(job.fd, BLKGETSIZE64, &size))
        err(1, "%s", argv[1]);
    job.blocks = size / job.block;
    if (!job.blocks)
        errx(1, "%s is smaller than a block", argv[1]);

    aio_context_t context = 0;
    if (syscall(SYS_io_setup, depth, &context))
        err(1, "io_setup");
    char *memory;
    if (posix_memalign((void **)&memory, 4096, depth * job.block))
        errx(1, "no memory");
    // Not zeroes, and touched before the clock runs.
    memset(memory, 0x5a, depth * job.block);

    static struct iocb requests[MAX_DEPTH];
    double begin = now(), from = total ? begin : begin + 0.1, until = from + PERIOD;
    uint64_t wanted = total / job.block, submitted = 0, done = 0, counted = 0;
    for (; submitted < (uint64_t)depth && (!total || submitted < wanted); submitted++)
        submit(context, &requests[submitted], memory + submitted * job.block);
    while (done < submitted) {
        struct io_event events[MAX_DEPTH];
        long count = syscall(SYS_io_getevents, context, 1, depth, events, NULL);
        if (count < 0)
            err(1, "io_getevents");
        double t = now();
        for (long i = 0; i < count; i++) {
            if (events[i].res != (int64_t)job.block)
                errx(1, "a request ended with %lld", (long long)events[i].res);
            done++;
            if (t >= from && t < until)
                counted++;
            if (total ? submitted < wanted : t < until) {
                submit(context, (struct iocb *)(uintptr_t)events[i].obj, (void *)(uintptr_t)events[i].data);
                submitted++;
            }
        }
    }
    if (total)
        printf("%.4f\n", now() - begin);
    else
        printf("%.0f\n", counted / PERIOD);
    return 0;
}
