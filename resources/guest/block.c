/*
 * Drives the first virtio-blk device through a real ring, first with direct descriptors and then, after a reset, with
 * indirect ones and the event index. Overwrites the disk from sector 8 to 71.
 */
#include "virtio.h"

enum { IN = 0, OUT = 1, FLUSH = 4, GET_ID = 8, DISCARD = 11, WRITE_ZEROES = 13 };
enum { OK = 0, IOERR = 1, UNSUPPORTED = 2, NO_ANSWER = 0xff, TIMEOUT = 0x100 };

#define BLOCK_READ_ONLY FEATURE(5)
#define BLOCK_FLUSH FEATURE(9)
#define BLOCK_DISCARD FEATURE(13)
#define BLOCK_WRITE_ZEROES FEATURE(14)
#define BLOCK_FEATURES (BLOCK_READ_ONLY | BLOCK_FLUSH | BLOCK_DISCARD | BLOCK_WRITE_ZEROES)

enum { SECTOR = 512, FIRST = 8, SECTORS = 64 };

static struct virtio disk;
static struct queue queue;
static u64 capacity;
static u8 data[SECTORS * SECTOR], copy[SECTORS * SECTOR];
static u32 written; /* what the device says that it wrote in the last request */

static struct {
    u32 type, reserved;
    u64 sector;
} header;
static u8 status;

/* One request with up to eight data pieces; gives the status byte. */
static u32 request(u32 type, u64 sector, const struct piece *pieces, u32 count)
{
    struct piece chain[10] = {{&header, sizeof(header), false}};
    header.type = type;
    header.sector = sector;
    status = NO_ANSWER;
    for (u32 i = 0; i < count; i++)
        chain[1 + i] = pieces[i];
    chain[1 + count] = (struct piece){&status, 1, true};
    queue_submit(&queue, chain, count + 2);
    return queue_wait(&queue, &written) ? status : TIMEOUT;
}

static u32 transfer(u32 type, u64 sector, void *at, u32 length)
{
    struct piece piece = {at, length, type != OUT};
    return request(type, sector, &piece, 1);
}

static bool expect(const char *name, u32 want, u32 got)
{
    return check(got == want, name, "status %x, not %x", got, want);
}

static bool expect_all(const char *name, const u8 *at, u32 length, u8 byte)
{
    for (u32 i = 0; i < length; i++)
        if (at[i] != byte)
            return failed(name, "byte %u is %x, not %x", i, at[i], byte);
    return passed(name);
}

static void fill_pattern(u8 seed)
{
    for (u32 i = 0; i < sizeof(data); i++)
        data[i] = seed + i * 7 + i / SECTOR;
}

static void reads_and_writes(u8 seed)
{
    fill_pattern(seed);
    expect("write", OK, transfer(OUT, FIRST, data, sizeof(data)));
    check(written == 1, "write-used-length", "%u, not 1", written);
    expect("read", OK, transfer(IN, FIRST, copy, sizeof(copy)));
    check(written == sizeof(copy) + 1, "read-used-length", "%u, not %u", written, (u32)sizeof(copy) + 1);
    check(memcmp(data, copy, sizeof(data)) == 0, "read-back", "other bytes than were written");

    memset(copy, 0, sizeof(copy));
    struct piece pieces[8];
    for (u32 i = 0; i < 8; i++)
        pieces[i] = (struct piece){copy + i * 3 * SECTOR, (i == 7 ? 3 : 1) * SECTOR, true};
    expect("read-pieces", OK, request(IN, FIRST, pieces, 8));
    bool same = memcmp(copy + 7 * 3 * SECTOR, data + 7 * SECTOR, 3 * SECTOR) == 0;
    for (u32 i = 0; i < 7; i++)
        same = same && memcmp(copy + i * 3 * SECTOR, data + i * SECTOR, SECTOR) == 0;
    check(same, "read-pieces-back", "a piece has other bytes than were written");
}

static void other_requests(void)
{
    if (disk.features & BLOCK_FLUSH)
        expect("flush", OK, request(FLUSH, 0, NULL, 0));
    else
        skipped("flush", "not offered");

    char id[21] = {0};
    if (expect("get-id", OK, transfer(GET_ID, 0, id, 20)))
        print("id=%s\n", id);

    struct {
        u64 sector;
        u32 sectors, flags;
    } range = {FIRST, 8, 0};
    if (disk.features & BLOCK_WRITE_ZEROES) {
        struct piece piece = {&range, sizeof(range), false};
        expect("write-zeroes", OK, request(WRITE_ZEROES, 0, &piece, 1));
        transfer(IN, FIRST, copy, 9 * SECTOR);
        expect_all("write-zeroes-back", copy, 8 * SECTOR, 0);
        check(memcmp(copy + 8 * SECTOR, data + 8 * SECTOR, SECTOR) == 0, "write-zeroes-end", "went too far");
        range.sector = capacity - 4;
        expect("write-zeroes-past-end", IOERR, request(WRITE_ZEROES, 0, &piece, 1));
    } else {
        skipped("write-zeroes", "not offered");
    }
    if (disk.features & BLOCK_DISCARD) {
        range.sector = FIRST + 16;
        struct piece piece = {&range, sizeof(range), false};
        expect("discard", OK, request(DISCARD, 0, &piece, 1));
        transfer(IN, FIRST + 24, copy, SECTOR);
        check(memcmp(copy, data + 24 * SECTOR, SECTOR) == 0, "discard-end", "went too far");
        range.sector = ~0ull;
        expect("discard-past-end", IOERR, request(DISCARD, 0, &piece, 1));
    } else {
        skipped("discard", "not offered");
    }
}

static void bad_requests(void)
{
    expect("unknown-type", UNSUPPORTED, transfer(0x7777, 0, copy, SECTOR));
    expect("read-past-end", IOERR, transfer(IN, capacity, copy, SECTOR));
    expect("read-over-end", IOERR, transfer(IN, capacity - 1, copy, 2 * SECTOR));
    expect("read-overflow", IOERR, transfer(IN, ~0ull, copy, SECTOR));
    expect("read-odd-length", IOERR, transfer(IN, 0, copy, SECTOR - 1));
    expect("alive", OK, transfer(IN, 0, copy, SECTOR));
}

static bool start_with(u64 features)
{
    if (!check(virtio_negotiate(&disk, BLOCK_FEATURES | features), "negotiate", "status %x", virtio_status(&disk)))
        return false;
    if (!check(virtio_queue(&disk, 0, &queue), "queue", "the device has no queue 0"))
        return false;
    virtio_run(&disk);
    return check(virtio_status(&disk) == 0xf, "running", "status %x", virtio_status(&disk));
}

static void run(u8 seed)
{
    if (disk.features & BLOCK_READ_ONLY) {
        expect("read", OK, transfer(IN, 0, copy, SECTOR));
        expect("write-refused", IOERR, transfer(OUT, FIRST, data, SECTOR));
    } else {
        reads_and_writes(seed);
        other_requests();
        bad_requests();
    }
    check(!(virtio_status(&disk) & STATUS_NEEDS_RESET), "healthy", "the device wants a reset");
}

/* `rounds=N`: sequential reads, for a look at the cost of a request. */
static void measure(u64 rounds)
{
    u64 since = timestamp();
    for (u64 i = 0; i < rounds; i++)
        if (transfer(IN, i % 64 * 8, copy, 8 * SECTOR) != OK) {
            failed("rounds", "read %lu", i);
            return;
        }
    print("cycles-per-read=%lu\n", (timestamp() - since) / rounds);
}

void main(void)
{
    if (!check(virtio_find(&disk, VIRTIO_BLOCK, option_number("disk", 0)), "find", "no block device"))
        return summary();
    capacity = readl(disk.config) | (u64)readl(disk.config + 4) << 32;
    print("slot=%u capacity=%lu\n", disk.slot, capacity);
    if (!check(capacity >= FIRST + SECTORS, "capacity", "%lu sectors are too few", capacity))
        return summary();

    print("direct\n");
    if (start_with(0))
        run(1);
    print("offered=%lx\n", disk.offered);
    u64 ring = disk.offered & (FEATURE_INDIRECT | FEATURE_EVENT_INDEX);
    print("indirect=%u event-index=%u\n", (u32)(ring / FEATURE_INDIRECT & 1), (u32)(ring / FEATURE_EVENT_INDEX));
    if (start_with(ring)) {
        run(101);
        if (option_number("rounds", 0) > 0)
            measure(option_number("rounds", 0));
    }
    summary();
}
