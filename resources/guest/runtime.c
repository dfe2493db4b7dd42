#include "runtime.h"

/* --- Memory --- */

void *memset(void *to, int byte, size_t size)
{
    void *at = to;
    asm volatile("rep stosb" : "+D"(at), "+c"(size) : "a"(byte) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, size_t size)
{
    void *at = to;
    asm volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(size) : : "memory");
    return to;
}

int memcmp(const void *a, const void *b, size_t size)
{
    const u8 *left = a, *right = b;
    for (; size > 0; size--, left++, right++)
        if (*left != *right)
            return *left - *right;
    return 0;
}

/* --- Output --- */

/* An emulated port is always ready: asking it would only double the exits. */
static void put(char c)
{
    outb(SERIAL, c);
}

static void put_number(u64 value, u32 base)
{
    char digits[20];
    int n = 0;
    do {
        digits[n++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value != 0);
    while (n > 0)
        put(digits[--n]);
}

static void print_list(const char *format, va_list list)
{
    for (; *format != 0; format++) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        bool wide = *++format == 'l';
        format += wide;
        switch (*format) {
        case 'c':
            put(va_arg(list, int));
            break;
        case 's':
            for (const char *s = va_arg(list, const char *); *s != 0; s++)
                put(*s);
            break;
        case 'u':
        case 'x':
            put_number(wide ? va_arg(list, u64) : va_arg(list, u32), *format == 'u' ? 10 : 16);
            break;
        default:
            put('?');
        }
    }
}

void print(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    print_list(format, list);
    va_end(list);
}

static u32 passes, failures;

bool passed(const char *name)
{
    print("ok %s\n", name);
    passes++;
    return true;
}

bool failed(const char *name, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    print("FAIL %s: ", name);
    print_list(format, list);
    put('\n');
    va_end(list);
    failures++;
    return false;
}

void skipped(const char *name, const char *why)
{
    print("skip %s: %s\n", name, why);
}

void summary(void)
{
    print("done: %u ok, %u failed\n", passes, failures);
}

/* --- Ring 0 --- */

/* The frame that entry.S builds. */
struct frame {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
    u64 vector, error, rip, cs, flags, rsp, ss;
};

enum { INVALID_OPCODE = 6, PAGE_FAULT = 14 };

/* An invalid opcode serves as the system call: of all ways into ring 0 it is the one that works on every host. */
#define UD2 0x0b0f
#define SUPERVISOR_CALL 0x5afec0de

void trap(struct frame *frame)
{
    bool user = (frame->cs & 3) == 3;
    if (frame->vector == INVALID_OPCODE && user && *(const u16 *)frame->rip == UD2 && frame->rax == SUPERVISOR_CALL) {
        ((void (*)(void *))frame->rdi)((void *)frame->rsi);
        frame->rip += 2;
        return;
    }
    u64 address = 0;
    if (frame->vector == PAGE_FAULT)
        asm volatile("mov %%cr2, %0" : "=r"(address));
    print("EXCEPTION vector=%lu error=%lx rip=%lx ring=%u flags=%lx rsp=%lx cr2=%lx\n", frame->vector, frame->error,
          frame->rip, (u32)frame->cs & 3, frame->flags, frame->rsp, address);
    panic();
}

void supervisor(void (*function)(void *), void *argument)
{
    asm volatile("ud2" : : "a"(SUPERVISOR_CALL), "D"(function), "S"(argument) : "memory");
}

struct msr {
    u32 index;
    u64 value;
};

static void read_msr_in_ring0(void *argument)
{
    struct msr *msr = argument;
    u32 low, high;
    asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr->index));
    msr->value = (u64)high << 32 | low;
}

static void write_msr_in_ring0(void *argument)
{
    struct msr *msr = argument;
    asm volatile("wrmsr" : : "c"(msr->index), "a"((u32)msr->value), "d"((u32)(msr->value >> 32)) : "memory");
}

u64 read_msr(u32 index)
{
    struct msr msr = {index, 0};
    supervisor(read_msr_in_ring0, &msr);
    return msr.value;
}

void write_msr(u32 index, u64 value)
{
    struct msr msr = {index, value};
    supervisor(write_msr_in_ring0, &msr);
}

/* --- Page tables --- */

extern u64 pml4[512];
static u64 spare_tables[16][512] __attribute__((aligned(4096)));
static u32 spare_tables_used;

/* The table that an entry points to; a new one if it points nowhere. */
static u64 *next_table(u64 *entry)
{
    if ((*entry & 1) == 0) {
        if (spare_tables_used == sizeof(spare_tables) / sizeof(spare_tables[0])) {
            print("out of page tables\n");
            panic();
        }
        *entry = (u64)spare_tables[spare_tables_used++] | 7;
    }
    return (u64 *)(*entry & ~0xfffull);
}

void map_device(u64 address, u64 size)
{
    const u64 page = 0x200000;
    for (u64 at = address & ~(page - 1); at < address + size; at += page) {
        u64 *pdpt = next_table(&pml4[at >> 39 & 511]);
        u64 *directory = next_table(&pdpt[at >> 30 & 511]);
        directory[at >> 21 & 511] = at | 0x87;
    }
}

/* --- Ends --- */

static void halt_in_ring0(void *unused)
{
    (void)unused;
    for (;;)
        asm volatile("cli; hlt");
}

_Noreturn void halt(void)
{
    u16 cs;
    asm("mov %%cs, %0" : "=r"(cs));
    if ((cs & 3) == 0)
        halt_in_ring0(NULL);
    supervisor(halt_in_ring0, NULL);
    __builtin_unreachable();
}

_Noreturn void power_off(void)
{
    outb(SLEEP_CONTROL, 5 << 2 | 1 << 5);
    halt();
}

_Noreturn void reset(void)
{
    outb(RESET, 1);
    halt();
}

_Noreturn void keyboard_reset(void)
{
    outb(I8042_COMMAND, 0xfe);
    halt();
}

_Noreturn void panic(void)
{
    outb(PVPANIC, 1);
    power_off();
}

static void fault_in_ring0(void *unused)
{
    (void)unused;
    struct __attribute__((packed)) {
        u16 limit;
        u64 base;
    } none = {0, 0};
    asm volatile("lidt %0; ud2" : : "m"(none));
}

_Noreturn void triple_fault(void)
{
    supervisor(fault_in_ring0, NULL);
    halt();
}

/* --- What the loader told us --- */

struct boot boot;

/* PVH (Xen's `struct hvm_start_info`, version 1). */
struct start_info {
    u32 magic, version, flags, modules;
    u64 module_list, cmdline, rsdp, map;
    u32 ranges, reserved;
};

struct module {
    u64 start, size, cmdline, reserved;
};

struct start_info_range {
    u64 start, size;
    u32 type, reserved;
};

static void add_range(u64 start, u64 size, u32 type)
{
    if (boot.ranges < sizeof(boot.map) / sizeof(boot.map[0]))
        boot.map[boot.ranges++] = (struct memory_range){start, size, type};
}

static void read_start_info(const struct start_info *info)
{
    if (info->magic != 0x336ec578) {
        print("no start info at %lx\n", (u64)info);
        panic();
    }
    boot.cmdline = (const char *)info->cmdline;
    boot.rsdp = info->rsdp;
    if (info->modules > 0) {
        const struct module *initrd = (const struct module *)info->module_list;
        boot.initrd = initrd->start;
        boot.initrd_size = initrd->size;
    }
    if (info->version >= 1) {
        const struct start_info_range *map = (const struct start_info_range *)info->map;
        for (u32 i = 0; i < info->ranges; i++)
            add_range(map[i].start, map[i].size, map[i].type);
    }
}

/* Linux's `struct boot_params`: the fields at their documented offsets. */
static void read_zero_page(u64 page)
{
    if (readl(page + 0x202) != 0x53726448 && readl(page + 0x202) != 0) {
        print("no zero page at %lx\n", page);
        panic();
    }
    boot.cmdline = (const char *)(readl(page + 0x228) | (u64)readl(page + 0xc8) << 32);
    boot.rsdp = readq(page + 0x70);
    boot.initrd = readl(page + 0x218) | (u64)readl(page + 0xc0) << 32;
    boot.initrd_size = readl(page + 0x21c) | (u64)readl(page + 0xc4) << 32;
    for (u32 i = 0; i < readb(page + 0x1e8); i++) {
        u64 entry = page + 0x2d0 + 20 * i;
        add_range(readq(entry), readq(entry + 8), readl(entry + 16));
    }
}

const char *option(const char *name)
{
    size_t length = 0;
    while (name[length] != 0)
        length++;
    bool word_start = true;
    for (const char *at = boot.cmdline; *at != 0; at++) {
        size_t n = 0;
        while (word_start && n < length && at[n] == name[n])
            n++;
        if (n == length && at[n] == '=')
            return at + n + 1;
        word_start = *at == ' ';
    }
    return NULL;
}

u64 option_number(const char *name, u64 otherwise)
{
    const char *at = option(name);
    if (at == NULL)
        return otherwise;
    u64 value = 0;
    for (; *at >= '0' && *at <= '9'; at++)
        value = 10 * value + (*at - '0');
    return value;
}

bool option_is(const char *name, const char *value)
{
    const char *at = option(name);
    if (at == NULL)
        return false;
    while (*value != 0 && *at == *value)
        at++, value++;
    return *value == 0 && (*at == 0 || *at == ' ');
}

/* Ring 3 begins here. */
_Noreturn void start(void)
{
    if (entry_state.pvh)
        read_start_info((const struct start_info *)entry_state.registers[3]);
    else
        read_zero_page(entry_state.registers[6]);
    if (boot.cmdline == NULL)
        boot.cmdline = "";
    main();
    power_off();
}
