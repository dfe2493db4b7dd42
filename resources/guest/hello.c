/*
 * Says hello, tells how it was entered, and ends as the command line asks:
 * `end=` off (default), reset, keyboard, panic, fault (triple), exception, halt, button (powers off when the power
 * button is pressed), echo (gives every byte of input back, up to and including `q`); `mark=1` writes the boot mark;
 * `stain=1` says what is in a word of memory that nobody else uses, and writes there.
 */
#include "runtime.h"

static void print_entry(void)
{
    static const char *const names[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                        "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
    const struct entry_state *s = &entry_state;
    print("entry=%s\n", s->pvh ? "pvh" : "linux64");
    print("cpl=%u paging=%u long=%u interrupts=%u\n", s->cs & 3u, (u32)(s->cr0 >> 31 & 1), (u32)(s->efer >> 10 & 1),
          (u32)(s->flags >> 9 & 1));
    print("cr0=%lx cr3=%lx cr4=%lx efer=%lx flags=%lx\n", s->cr0, s->cr3, s->cr4, s->efer, s->flags);
    print("cs=%x ds=%x es=%x ss=%x tr=%x\n", s->cs, s->ds, s->es, s->ss, s->tr);
    for (int i = 0; i < 16; i++)
        print("%s=%lx%c", names[i], s->registers[i], i == 15 ? '\n' : ' ');
}

static void print_boot(void)
{
    print("cmdline=%s\n", boot.cmdline);
    print("rsdp=%lx initrd=%lx+%lx\n", boot.rsdp, boot.initrd, boot.initrd_size);
    for (u32 i = 0; i < boot.ranges; i++)
        print("memory=%lx+%lx type=%u\n", boot.map[i].start, boot.map[i].size, boot.map[i].type);
}

static void wait_for_button(void)
{
    while ((readl(EVENT_DEVICE) & 1) == 0)
        pause();
    print("button\n");
}

static void echo(void)
{
    enum { LINE_STATUS = SERIAL + 5, DATA_READY = 1 };
    u8 byte = 0;
    while (byte != 'q') {
        while ((inb(LINE_STATUS) & DATA_READY) == 0)
            pause();
        byte = inb(SERIAL);
        print("%c", byte);
    }
}

static void stain(void)
{
    volatile u64 *word = (u64 *)0x2800000;
    print("stain=%lx\n", *word);
    *word = 0x57a14;
}

void main(void)
{
    print("hello\n");
    print_entry();
    print_boot();
    if (option_number("mark", 0) != 0)
        writeb(BOOT_MARK, 123);
    if (option_number("stain", 0) != 0)
        stain();
    print("end\n");
    if (option_is("end", "reset"))
        reset();
    if (option_is("end", "keyboard"))
        keyboard_reset();
    if (option_is("end", "panic"))
        panic();
    if (option_is("end", "fault"))
        triple_fault();
    if (option_is("end", "exception"))
        writeb(0x123456789000, 0);
    if (option_is("end", "halt"))
        halt();
    if (option_is("end", "button"))
        wait_for_button();
    if (option_is("end", "echo"))
        echo();
}
