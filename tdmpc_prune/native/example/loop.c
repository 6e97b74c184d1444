/* A control loop at a fixed rate: it waits for the clock, counts the decisions that came too late,
 * and says how long they took. Put your sensors and motors where it says so. */
#define _POSIX_C_SOURCE 200112L
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "weights.h"

#include "agent.h"

#ifndef RATE_HZ
#define RATE_HZ 100 /* the agent was trained for the control period in agent.json */
#endif
#define PERIOD (1000000000L / RATE_HZ) /* ns */

static long since(const struct timespec *then)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (now.tv_sec - then->tv_sec) * 1000000000L + (now.tv_nsec - then->tv_nsec);
}

int main(void)
{
    static agent_control control;
    float observation[AGENT_OBSERVATION] = {0}, action[AGENT_ACTION] = {0};
    struct timespec due, began;
    long overruns = 0, longest = 0;
    clock_gettime(CLOCK_MONOTONIC, &due);
    for (int tick = 0; tick < 3 * RATE_HZ; tick++) {
        clock_gettime(CLOCK_MONOTONIC, &began);
        observation[tick % AGENT_OBSERVATION] = 0.01f * (float)(tick % 10); /* read your sensors */
        if (agent_act(&control, observation, action) != PLANNER_OK)
            memset(action, 0, sizeof action); /* what is safe to do without an action */
        /* drive your motors with `action` */
        long took = since(&began);
        longest = took > longest ? took : longest;
        due.tv_nsec += PERIOD;
        due.tv_sec += due.tv_nsec / 1000000000L;
        due.tv_nsec %= 1000000000L;
        if (since(&due) > 0) {
            overruns++;
            clock_gettime(CLOCK_MONOTONIC, &due); /* what is lost is not made up for */
        } else
            while (since(&due) < 0) {
                struct timespec rest = {0, -since(&due)};
                if (rest.tv_nsec > 0)
                    nanosleep(&rest, NULL);
            }
    }
    printf("%d decisions at %d Hz: %ld later than their period, the longest took %.3f ms\n",
           3 * RATE_HZ, RATE_HZ, overruns, (double)longest / 1e6);
    return 0;
}
