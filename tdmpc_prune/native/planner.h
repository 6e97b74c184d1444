/* A TD-MPC planner in C99: one decision from an observation, or the policy's action alone.
 *
 * What `planner.py` and `world_model.py` compute, with the same names in the same order, for one
 * environment. Nothing is allocated, nothing is kept between calls, and no library is needed but
 * `memcpy`; calls with workspaces of their own may run at the same time.
 *
 * Sizes: H the horizon in decisions, M >= H rows of means, N Gaussian and P policy trajectories,
 * K elites, I iterations, O observation, A action, D latent. Arrays are row by row, as in PyTorch.
 */
#ifndef PLANNER_H
#define PLANNER_H

#include <stddef.h>
#include <stdint.h>

/* Samples that one instruction works on, and samples that are carried through the networks
 * together. Every width gives the same numbers, up to the rounding of fused multiply-adds. */
#ifndef PLANNER_WIDTH
#if !defined(__GNUC__)
#define PLANNER_WIDTH 1
#elif defined(__AVX512F__)
#define PLANNER_WIDTH 16
#elif defined(__AVX__)
#define PLANNER_WIDTH 8
#elif defined(__SSE2__) || defined(__ARM_NEON)
#define PLANNER_WIDTH 4
#else
#define PLANNER_WIDTH 1
#endif
#endif
#define PLANNER_TILE (4 * PLANNER_WIDTH)

/* What a call returns. Unless it is PLANNER_OK, nothing has been written. */
enum {
    PLANNER_OK = 0,
    PLANNER_NOT_FINITE = 1, /* an element of the observation is infinite or not a number */
    PLANNER_BAD_SIZES = 2   /* sizes below 1, more elites than samples, H > M, layers that do not
                             * follow each other */
};

/* How weights are stored. They are computed with in float32. */
enum { PLANNER_FLOAT32 = 0, PLANNER_FLOAT16 = 1, PLANNER_INT8 = 2 };

typedef struct {
    const void *weight; /* [outputs][inputs], of `type` */
    const float *scale; /* [outputs], what an int8 weight of 1 is worth; else NULL */
    const float *bias;  /* [outputs] */
    int outputs, inputs, type;
} planner_layer;

typedef struct {
    planner_layer first; /* followed by LayerNorm and tanh */
    const float *norm_weight, *norm_bias;
    planner_layer second, third; /* followed by ELU; the value */
} planner_q;

typedef struct {
    int observation, action, latent;
    planner_layer encoder[2], dynamics[3], reward[3], policy[3];
    const planner_q *q_ensemble; /* [members] */
    int members;
} planner_model;

typedef struct {
    int horizon;        /* H, planned with */
    int means;          /* M, rows of the means */
    int iterations;     /* I */
    int samples;        /* N */
    int policy_samples; /* P */
    int elites;         /* K */
    float temperature, momentum, min_std, max_std, policy_noise, policy_noise_clip;
    float discount; /* per decision */
} planner_config;

/* Where the noise comes from if it is not given: the same key draws the same numbers in every
 * build (Philox 4x32-10, Salmon et al. 2011). */
typedef struct {
    uint64_t seed;
    uint32_t stream;   /* of several environments */
    uint32_t decision; /* count up */
} planner_key;

/* Noise from outside: standard normal, but `choice` uniform in [0, 1). */
typedef struct {
    float *samples;     /* [I][H][N][A] */
    float *sample_ends; /* [I][N][A] */
    float *policy;      /* [H][P][A] */
    float *policy_ends; /* [P][A] */
    float *choice;      /* [1] */
    float *exploration; /* [A] */
} planner_noise;

/* Where a decision goes. All but `action` and `means` may be NULL. */
typedef struct {
    float *action; /* [A] in [-1, 1]: execute this */
    float *means;  /* [M][A]: hand these back at the next decision; may be the previous ones */
    float *std;    /* [A] of the first step after the last iteration */
    float *value;  /* [1] mean value of the elites, as the model predicts it */
    float *values; /* [I][N + P] of all trajectories, in every iteration */
    float *scores; /* [K] of the last elites, best first; one of them was executed */
} planner_decision;

/* Bytes of workspace that a call needs, for any address; a constant if its arguments are. `widest`
 * is the largest number of units in a layer or of inputs of one; `small` is 1 where a type of
 * weights is not float32. */
#define PLANNER_ROUND(count) (((count) + PLANNER_WIDTH - 1) / PLANNER_WIDTH * PLANNER_WIDTH)
#define PLANNER_ROWS (PLANNER_WIDTH == 1 ? 4 : PLANNER_WIDTH == 16 ? 8 : 6)
#define PLANNER_DECODED(widest) (PLANNER_WIDTH == 1 ? 0 : PLANNER_ROWS * PLANNER_ROUND(widest))
#define PLANNER_WORKSPACE(widest, latent, action, horizon, samples, policy_samples, elites, small) \
    (sizeof(float) *                                                                               \
     (size_t)(PLANNER_TILE * (2 * (widest) + (latent) + (action)                                   \
                              + ((horizon) + 1) * (action) + 2 + (horizon))                        \
              + (horizon) * (action) * (PLANNER_ROUND(samples) + PLANNER_ROUND(policy_samples))    \
              + (samples) + (policy_samples) + PLANNER_ROUND(elites) * 2                           \
              + 2 * PLANNER_ROUND((horizon) * (action)) + PLANNER_ROUND(latent)                    \
              + 2 * PLANNER_ROUND(widest) + (small) * PLANNER_DECODED(widest)                      \
              + PLANNER_WIDTH))

/* Bytes of workspace that a call with this model and these settings needs. */
size_t planner_workspace(const planner_model *model, const planner_config *config);

/* One decision.
 *
 * observation     [O]
 * previous_means  [M][A] of the last decision; zeros after a reset
 * noise           from outside, or NULL: it is drawn from `key`
 * explore         not 0: add the planner's own std as noise to the action, as training does
 * workspace       of at least `planner_workspace` bytes
 */
int planner_plan(const planner_model *model, const planner_config *config,
                 const float *observation, const float *previous_means, const planner_noise *noise,
                 const planner_key *key, int explore, const planner_decision *decision,
                 void *workspace);

/* The policy's action [A] in [-1, 1] for an observation [O], without planning and without noise. */
int planner_policy(const planner_model *model, const float *observation, float *action,
                   void *workspace);

/* Fill the arrays of `noise` with what `planner_plan` draws from `key`. */
int planner_draw(const planner_model *model, const planner_config *config, const planner_key *key,
                 const planner_noise *noise, void *workspace);

/* PLANNER_WIDTH that this was compiled with. */
int planner_width(void);

#endif
