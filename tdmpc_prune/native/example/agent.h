/* The agent of weights.h in control of one environment. */
#ifndef AGENT_H
#define AGENT_H

#include "planner.h"

typedef struct {
    float means[AGENT_MEANS][AGENT_ACTION]; /* zeros after a reset */
    planner_key key;                        /* of the noise */
    unsigned char workspace[AGENT_WORKSPACE];
} agent_control;

/* Observation -> action, each in the order that agent.json says; a status of planner.h. */
static int agent_act(agent_control *control, const float observation[AGENT_OBSERVATION],
                     float action[AGENT_ACTION])
{
#if AGENT_PLANS
    const planner_decision decision = {action, control->means[0], NULL, NULL, NULL, NULL};
    int status = planner_plan(&agent_model, &agent_config, observation, control->means[0], NULL,
                              &control->key, 0, &decision, control->workspace);
    control->key.decision++;
    return status;
#else
    return planner_policy(&agent_model, observation, action, control->workspace);
#endif
}

#endif
