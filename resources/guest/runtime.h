/* What every guest of this folder stands on. Guests are C programs in ring 3 with access to all ports. */
#pragma once

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

/* The machine: what the address map of the monitor says. */
enum {
    SERIAL = 0x3f8,
    I8042_COMMAND = 0x64,
    PVPANIC = 0x505,
    SLEEP_CONTROL = 0x600,
    SLEEP_STATUS = 0x601,
    RESET = 0x602,
};
#define BOOT_MARK 0xc0000000ull
#define EVENT_DEVICE 0xc0001000ull
#define PCI_WINDOW 0xd0000000ull
#define ECAM 0xe0000000ull
#define LAPIC 0xfee00000ull

/* The guest itself; its return value does not matter. */
void main(void);

/* --- How the first CPU was entered (entry.S fills it in) --- */

struct entry_state {
    /* RAX RCX RDX RBX RSP RBP RSI RDI R8 ... R15 */
    u64 registers[16];
    u64 flags, cr0, cr3, cr4, efer;
    u16 cs, ds, es, ss, tr;
    u8 pvh;
};
extern struct entry_state entry_state;

struct memory_range {
    u64 start, size;
    u32 type;
};

/* What the loader told us, in one form for both protocols. */
extern struct boot {
    const char *cmdline;
    u64 rsdp;
    u64 initrd, initrd_size;
    u32 ranges;
    struct memory_range map[128];
} boot;

/* The value of `name=` on the command line, up to the next space; NULL if it is not there. */
const char *option(const char *name);
/* The same as a number; `otherwise` if it is not there. */
u64 option_number(const char *name, u64 otherwise);
bool option_is(const char *name, const char *value);

/* --- Output --- */

/* Understands %c %s %u %x %lu %lx. */
__attribute__((format(printf, 1, 2))) void print(const char *format, ...);

/* One line for each check: `ok NAME` or `FAIL NAME: DETAIL`. */
#define check(condition, name, ...) ((condition) ? passed(name) : failed(name, __VA_ARGS__))
bool passed(const char *name);
__attribute__((format(printf, 2, 3))) bool failed(const char *name, const char *format, ...);
void skipped(const char *name, const char *why);
/* The last line: `done: N ok, M failed`. */
void summary(void);

/* --- The CPU --- */

#define PORT_ACCESS(type, suffix)                                              \
    static inline type in##suffix(u16 port)                                    \
    {                                                                          \
        type value;                                                            \
        asm volatile("in %1, %0" : "=a"(value) : "Nd"(port) : "memory");       \
        return value;                                                          \
    }                                                                          \
    static inline void out##suffix(u16 port, type value)                       \
    {                                                                          \
        asm volatile("out %0, %1" : : "a"(value), "Nd"(port) : "memory");      \
    }
PORT_ACCESS(u8, b)
PORT_ACCESS(u16, w)
PORT_ACCESS(u32, l)

/* One access of exactly this width. */
#define MMIO_ACCESS(type, suffix)                                              \
    static inline type read##suffix(u64 address)                               \
    {                                                                          \
        type value;                                                            \
        asm volatile("mov (%1), %0" : "=r"(value) : "r"(address) : "memory");  \
        return value;                                                          \
    }                                                                          \
    static inline void write##suffix(u64 address, type value)                  \
    {                                                                          \
        asm volatile("mov %0, (%1)" : : "r"(value), "r"(address) : "memory");  \
    }
MMIO_ACCESS(u8, b)
MMIO_ACCESS(u16, w)
MMIO_ACCESS(u32, l)
MMIO_ACCESS(u64, q)

static inline u64 timestamp(void)
{
    u32 low, high;
    asm volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}

static inline void cpuid(u32 leaf, u32 subleaf, u32 out[4])
{
    asm volatile("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(subleaf));
}

/* Waits for memory that someone else writes. */
static inline void pause(void)
{
    asm volatile("pause" : : : "memory");
}

/* True until about `seconds` have passed since `since`, on a CPU of up to 4 GHz. */
static inline bool within(u64 since, u32 seconds)
{
    return timestamp() - since < seconds * 4000000000ull;
}

/* Runs `function(argument)` in ring 0. */
void supervisor(void (*function)(void *), void *argument);
u64 read_msr(u32 msr);
void write_msr(u32 msr, u64 value);

/* Makes device memory beyond 4 GiB accessible. */
void map_device(u64 address, u64 size);

/* --- Ways to end; none returns --- */

_Noreturn void power_off(void);
_Noreturn void reset(void);
_Noreturn void keyboard_reset(void);
_Noreturn void panic(void);
_Noreturn void triple_fault(void);
_Noreturn void halt(void);

void *memset(void *to, int byte, size_t size);
void *memcpy(void *to, const void *from, size_t size);
int memcmp(const void *a, const void *b, size_t size);
