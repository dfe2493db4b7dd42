/*
 * The smallest guest: one byte on the serial port, then off. It is what a start is measured with.
 * The same bytes run in 32-bit mode (PVH) and in 64-bit mode.
 */
    .globl entry32, entry64
    .text
entry32:
entry64:
    mov $0x3f8, %dx
    mov $'T', %al
    out %al, %dx
    mov $0x600, %dx
    mov $0x34, %al
    out %al, %dx
    hlt

    .section .note.GNU-stack, "", @progbits
