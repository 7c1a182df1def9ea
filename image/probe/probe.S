# The smallest guest that boots by UEFI: says that it runs on the serial port and powers off.
# It uses no firmware service for output, so that it works before and without any console driver.
# RCX holds the image handle and RDX the system table (UEFI calling convention).

        .set    COM1, 0x3f8
        .set    COM1_STATUS, COM1 + 5
        .set    TRANSMITTER_EMPTY, 0x20
        .set    SYSTEM_TABLE_RUNTIME_SERVICES, 0x58
        .set    RUNTIME_SERVICES_RESET_SYSTEM, 0x68
        .set    RESET_SHUTDOWN, 2

        .text
        .globl  efi_main
efi_main:
        subq    $40, %rsp               # shadow space of the callee, and alignment to 16
        movq    SYSTEM_TABLE_RUNTIME_SERVICES(%rdx), %rbx
        leaq    message(%rip), %rsi
next:   lodsb
        testb   %al, %al
        jz      done
        movb    %al, %cl
wait:   movw    $COM1_STATUS, %dx
        inb     %dx, %al
        testb   $TRANSMITTER_EMPTY, %al
        jz      wait
        movb    %cl, %al
        movw    $COM1, %dx
        outb    %al, %dx
        jmp     next
done:   movl    $RESET_SHUTDOWN, %ecx
        xorl    %edx, %edx              # EFI_SUCCESS
        xorl    %r8d, %r8d              # no data
        xorl    %r9d, %r9d
        callq   *RUNTIME_SERVICES_RESET_SYSTEM(%rbx)
halt:   hlt
        jmp     halt

message:
        .asciz  "\r\nHOLDFAST-PROBE READY\r\n"
