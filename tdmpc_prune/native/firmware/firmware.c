/* Chained decisions on a Cortex-M: prints their bits, instructions and stack through semihosting.
 * QEMU counts an instruction as a nanosecond (-icount shift=0), SysTick counts at 25 MHz. */
#include <string.h>

#include "weights.h"

#include "agent.h"
#include "trial.h"

#define REGISTER(address) (*(volatile uint32_t *)(address))
#define PAINT 0xa5a5a5a5u
#ifndef TIMER_TOP
#define TIMER_TOP 0xffffffu /* from which SysTick counts down, again and again */
#endif

extern uint32_t data_from[], data_start[], data_end[], bss_start[], bss_end[], stack_end[];
extern uint32_t stack_top[];

static void write(const char *text)
{
    register uint32_t operation __asm__("r0") = 4; /* SYS_WRITE0 */
    register const char *argument __asm__("r1") = text;
    __asm__ volatile("bkpt 0xab" : "+r"(operation) : "r"(argument) : "memory");
}

static void write_hex(uint32_t number)
{
    char text[10] = {0};
    for (int i = 0; i < 8; i++)
        text[i] = "0123456789abcdef"[number >> (28 - 4 * i) & 15];
    text[8] = ' ';
    write(text);
}

static void write_floats(const float *x, int count)
{
    for (int i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        write_hex(bits);
    }
}

static void leave(void)
{
    register uint32_t operation __asm__("r0") = 0x18; /* SYS_EXIT */
    register uint32_t argument __asm__("r1") = 0x20026; /* the application ends */
    __asm__ volatile("bkpt 0xab" : "+r"(operation) : "r"(argument) : "memory");
    for (;;) {
    }
}

static agent_control control;
static volatile uint32_t begun_anew; /* SysTick */

static void timer(void)
{
    begun_anew++;
}

/* Not within reset(), which may use no floating point before it is on. */
__attribute__((noinline)) static void run(void)
{
    float action[AGENT_ACTION];
    for (int i = 0; i < TRIAL_DECISIONS; i++) {
        begun_anew = 0;
        REGISTER(0xe000e014) = TIMER_TOP;
        REGISTER(0xe000e018) = 0;
        REGISTER(0xe000e010) = 7; /* the processor's clock, an interrupt at 0, counting */
        int status = agent_act(&control, trial_observations[i], action);
        REGISTER(0xe000e010) = 6; /* stop, with the same clock */
        uint32_t ticks = begun_anew * (TIMER_TOP + 1) + TIMER_TOP - REGISTER(0xe000e018);
        write(status == PLANNER_OK ? "decision " : "refused ");
        write_hex(ticks);
        write_floats(action, AGENT_ACTION);
        write_floats(control.means[0], AGENT_MEANS * AGENT_ACTION);
        write("\n");
    }
    uint32_t *painted = stack_end;
    while (*painted == PAINT)
        painted++;
    write("stack ");
    write_hex((uint32_t)((char *)stack_top - (char *)painted));
    write("\n");
    leave();
}

void reset(void)
{
    REGISTER(0xe000ed88) |= 0xf << 20; /* floating point */
    __asm__ volatile("dsb\n\tisb");
    for (uint32_t *from = data_from, *to = data_start; to < data_end;)
        *to++ = *from++;
    for (uint32_t *to = bss_start; to < bss_end;)
        *to++ = 0;
    for (uint32_t *to = stack_end; to < stack_top - 64; to++)
        *to = PAINT;
    run();
}

static void fault(void)
{
    write("fault\n");
    leave();
}

__attribute__((section(".vectors"), used)) static const void *const vectors[] = {
    stack_top, (const void *)reset, (const void *)fault, (const void *)fault,
    (const void *)fault, (const void *)fault, (const void *)fault, [15] = (const void *)timer,
};
