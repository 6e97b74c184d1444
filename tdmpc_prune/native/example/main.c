/* Observations in, actions out: for each line of numbers one line of numbers. */
#include <stdio.h>
#include <string.h>

#include "weights.h"

#include "agent.h"

int main(void)
{
    static agent_control control;
    float observation[AGENT_OBSERVATION], action[AGENT_ACTION];
    int read = 0;
    while (scanf("%f", &observation[read]) == 1) {
        if (++read < AGENT_OBSERVATION)
            continue;
        read = 0;
        int status = agent_act(&control, observation, action);
        if (status != PLANNER_OK) {
            fprintf(stderr, "error: no action, planner.h says what status %d is\n", status);
            return 1;
        }
        for (int i = 0; i < AGENT_ACTION; i++)
            printf("%.9g%c", (double)action[i], i + 1 < AGENT_ACTION ? ' ' : '\n');
        fflush(stdout);
    }
    return read ? 1 : 0;
}
