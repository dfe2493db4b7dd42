/*
 * Works on `kib=N` (64) KiB of memory as it is told over the serial port, and says what has come of it:
 *
 *   w  writes 64 words, at random
 *   z  fills a page with zeroes
 *   d  has a disk write 4 KiB of its contents into a page (`disk=1`)
 *   b  writes a page to the disk
 *   s  says `after N: SUM`, of N letters so far and all of the memory
 *   q  ends
 *
 * What is random follows from a number that everybody knows: the letters and the disk's contents tell the sum. With
 * `beat=1` it writes dots without end instead.
 */
#include "virtio.h"

#define MEMORY ((u64 *)0x400000)
enum { PAGE = 4096, PAGE_WORDS = PAGE / sizeof(u64), SECTOR = 512, IN = 0, OUT = 1, OK = 0 };

static struct virtio disk;
static struct queue queue;
static u64 words, capacity, commands, random = 0x9e3779b97f4a7c15;

static u64 next(void)
{
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random;
}

static u64 *random_page(void)
{
    return MEMORY + next() % (words / PAGE_WORDS) * PAGE_WORDS;
}

static bool find_disk(void)
{
    if (!virtio_find(&disk, VIRTIO_BLOCK, 0) || !virtio_negotiate(&disk, FEATURE_INDIRECT | FEATURE_EVENT_INDEX) ||
        !virtio_queue(&disk, 0, &queue))
        return false;
    capacity = readl(disk.config) | (u64)readl(disk.config + 4) << 32;
    virtio_run(&disk);
    return capacity >= PAGE / SECTOR;
}

/* Moves a page from the disk (IN) or to it (OUT), from a place to a place at random. */
static void use_disk(u32 type)
{
    static struct {
        u32 type, reserved;
        u64 sector;
    } header;
    static u8 status;
    u64 *page = random_page();
    header.type = type;
    header.sector = next() % (capacity - PAGE / SECTOR + 1);
    status = 0xff;
    struct piece chain[] = {{&header, sizeof(header), false}, {page, PAGE, type == IN}, {&status, 1, true}};
    u32 written;
    queue_submit(&queue, chain, 3);
    if (!queue_wait(&queue, &written) || status != OK)
        print("the disk fails with %x\n", status);
}

static u64 sum(void)
{
    u64 sum = 0xcbf29ce484222325;
    for (u64 i = 0; i < words; i++)
        sum = (sum ^ MEMORY[i]) * 0x100000001b3;
    return sum;
}

static u8 command(void)
{
    enum { LINE_STATUS = SERIAL + 5, DATA_READY = 1 };
    while ((inb(LINE_STATUS) & DATA_READY) == 0)
        pause();
    return inb(SERIAL);
}

void main(void)
{
    words = option_number("kib", 64) * 1024 / sizeof(u64);
    for (u64 i = 0; i < words; i++)
        MEMORY[i] = i + 1;
    bool has_disk = option_is("disk", "1");
    if (has_disk && !find_disk()) {
        print("no disk\n");
        return;
    }
    print("ready\n");
    while (option_is("beat", "1"))
        print(".");
    for (;;) {
        u8 letter = command();
        commands++;
        if (letter == 'w') {
            for (u32 i = 0; i < 64; i++) {
                u64 *word = MEMORY + next() % words;
                *word = next();
            }
        } else if (letter == 'z') {
            memset(random_page(), 0, PAGE);
        } else if (letter == 'd' && has_disk) {
            use_disk(IN);
        } else if (letter == 'b' && has_disk) {
            use_disk(OUT);
        } else if (letter == 's') {
            print("after %lu: %lx\n", commands, sum());
        } else if (letter == 'q') {
            return;
        } else {
            print("what is %c?\n", letter);
        }
    }
}
