/* See planner.h. Compile with -ffp-contract=off: products are fused with sums where it says
 * `multiply_add` and nowhere else, so that the noise is the same in every build. */
#include "planner.h"

#include <float.h>
#include <string.h>

#define WIDTH PLANNER_WIDTH
#define TILE PLANNER_TILE

#define VECTORS (WIDTH == 1 ? 4 : 2) /* that a sum is made for at once */

#if defined(__clang__)
#define UNROLLED _Pragma("unroll")
#elif defined(__GNUC__)
#define UNROLLED _Pragma("GCC unroll 8")
#else
#define UNROLLED
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline, unused))
#define ALONE static __attribute__((noinline))
#else
#define INLINE static inline
#define ALONE static
#endif

#if WIDTH == 16 && defined(__AVX512F__) || WIDTH == 8 && defined(__FMA__)
#include <immintrin.h>
#elif WIDTH == 4 && defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

/* --- Arithmetic on WIDTH samples at once ------------------------------------------------------ */

#if WIDTH == 1
typedef float vec;
typedef int32_t ivec;
INLINE vec spread(float x) { return x; }
INLINE vec as_float(ivec x) { return (float)x; }
#else
typedef float vec __attribute__((vector_size(4 * WIDTH), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), may_alias));
INLINE vec spread(float x) { return x - (vec){0}; }
INLINE vec as_float(ivec x) { return __builtin_convertvector(x, vec); }
#endif

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec x) { *(vec *)to = x; }

#define SIGN (-2147483647 - 1) /* a float's bit */

INLINE ivec bits(vec x)
{
    ivec same;
    memcpy(&same, &x, sizeof same);
    return same;
}

INLINE vec from_bits(ivec x)
{
    vec same;
    memcpy(&same, &x, sizeof same);
    return same;
}

/* a * b + c, rounded once where the processor can. */
INLINE vec multiply_add(vec a, vec b, vec c)
{
#if WIDTH == 16 && defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif WIDTH == 8 && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif WIDTH == 4 && defined(__ARM_NEON) && defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* a < b ? x : y */
INLINE vec where_less(vec a, vec b, vec x, vec y)
{
#if WIDTH == 1
    return a < b ? x : y;
#else
    ivec yes = (ivec)(a < b);
    return from_bits((yes & bits(x)) | (~yes & bits(y)));
#endif
}

/* What is not a number stays so. */
INLINE vec clamp(vec x, float low, float high)
{
    x = where_less(x, spread(low), spread(low), x);
    return where_less(spread(high), x, spread(high), x);
}

/* The square root of what is not negative, to 1e-7 of itself. */
INLINE vec root(vec x)
{
    vec y = from_bits(0x5f3759df - (bits(x) >> 1));
    for (int i = 0; i < 3; i++)
        y = y * (1.5f - 0.5f * x * y * y);
    vec s = x * y;
    return s + 0.5f * y * (x - s * s);
}

/* e^x for x <= 0 as scale * (1 + rest). */
INLINE vec exponential(vec x, vec *scale)
{
    x = where_less(x, spread(-87.0f), spread(-87.0f), x);
    vec shifted = x * 1.44269504f + 12582912.0f; /* the nearest integer is in its last bits */
    vec n = shifted - 12582912.0f;
    vec r = multiply_add(n, spread(-0.693145752f), x);
    r = multiply_add(n, spread(-1.42860677e-6f), r);
    vec p = spread(0.00139504788f);
    p = multiply_add(p, r, spread(0.00836888235f));
    p = multiply_add(p, r, spread(0.0416662060f));
    p = multiply_add(p, r, spread(0.166665182f));
    p = multiply_add(p, r, spread(0.5f));
    *scale = from_bits((bits(shifted) - 0x4b400000 + 127) * 8388608);
    return multiply_add(p * r, r, r);
}

/* e^x - 1 for x <= 0. */
INLINE vec exponential_less_1(vec x)
{
    vec scale, rest = exponential(x, &scale);
    return multiply_add(scale, rest, scale - 1.0f);
}

INLINE vec elu(vec x)
{
    vec zero = spread(0.0f);
    return where_less(zero, x, x, exponential_less_1(where_less(zero, x, zero, x)));
}

INLINE vec hyperbolic_tangent(vec x)
{
    ivec sign = bits(x) & SIGN;
    vec t = exponential_less_1(-2.0f * from_bits(bits(x) ^ sign));
    return from_bits(bits(-t / (t + 2.0f)) | sign);
}

/* The natural logarithm of 0 < x <= 1. */
INLINE vec logarithm(vec x)
{
    ivec e = (bits(x) - 0x3f3504f3) >> 23;
    vec f = from_bits(bits(x) - e * 8388608) - 1.0f; /* of sqrt(1/2) to sqrt(2), less 1 */
    vec s = f / (2.0f + f), t = s * s;
    vec series = t * (0.666668177f + t * (0.399736047f + t * 0.299612701f));
    return as_float(e) * 0.693147181f + (2.0f * s + s * series);
}

#ifndef PLANNER_ARITHMETIC /* all that learner.c takes from here */

/* --- Noise ------------------------------------------------------------------------------------ */

typedef struct {
    const planner_noise *given; /* or NULL */
    planner_key key;
    int horizon, action, iterations, samples, policy_samples;
} source;

/* Philox 4x32-10 for WIDTH counters that follow each other in their first word. */
INLINE void philox(uint32_t words[4][WIDTH], const planner_key *key)
{
    uint32_t key0 = (uint32_t)key->seed, key1 = (uint32_t)(key->seed >> 32);
    for (int round = 0; round < 10; round++) {
        for (int lane = 0; lane < WIDTH; lane++) {
            uint64_t product0 = (uint64_t)0xD2511F53u * words[0][lane];
            uint64_t product1 = (uint64_t)0xCD9E8D57u * words[2][lane];
            words[0][lane] = (uint32_t)(product1 >> 32) ^ words[1][lane] ^ key0;
            words[1][lane] = (uint32_t)product1;
            words[2][lane] = (uint32_t)(product0 >> 32) ^ words[3][lane] ^ key1;
            words[3][lane] = (uint32_t)product0;
        }
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

/* Two standard normal numbers from two random words (Box and Muller). */
INLINE void box_muller(const uint32_t first[WIDTH], const uint32_t second[WIDTH], vec normal[2])
{
    ivec one, other;
    memcpy(&one, first, sizeof one);
    memcpy(&other, second, sizeof other);
    vec uniform = as_float(((one >> 8) & 0xffffff) + 1) * 5.96046448e-8f; /* in (0, 1] */
    vec radius = root(0.0f - 2.0f * logarithm(uniform));
    /* An angle in an eighth to either side; the lowest bits turn and mirror it to the others. */
    vec angle = as_float(other >> 8) * 9.36234254e-8f; /* in [-pi/4, pi/4) */
    vec t = angle * angle;
    vec sine = -0.166666508f + t * (0.00833197869f + t * -0.000194956344f);
    sine = angle + angle * t * sine;
    vec cosine = 0.0416666456f + t * (-0.00138873677f + t * 0.0000244384501f);
    cosine = 1.0f + t * (-0.5f + t * cosine);
    ivec turned = -(other & 1);
    ivec a = (bits(cosine) & ~turned) | (bits(sine) & turned);
    ivec b = (bits(sine) & ~turned) | (bits(cosine) & turned);
    normal[0] = radius * from_bits(a ^ (-((other >> 1) & 1) & SIGN));
    normal[1] = radius * from_bits(b ^ (-((other >> 2) & 1) & SIGN));
}

INLINE void counted(uint32_t words[4][WIDTH], const planner_key *key, int part, int four,
                    int first)
{
    for (int lane = 0; lane < WIDTH; lane++) {
        words[0][lane] = (uint32_t)(first + lane);
        words[1][lane] = ((uint32_t)part << 16) + (uint32_t)four;
        words[2][lane] = key->decision;
        words[3][lane] = key->stream;
    }
    philox(words, key);
}

/* Normal numbers for samples `first` and on: rows [H * A] for the steps, then [A] for the ends.
 * `part` is the iteration; I means the policy trajectories. */
ALONE void draw(const source *noise, int part, int first, int vectors, float *to)
{
    int actions = noise->action, steps = noise->horizon * actions, rows = steps + actions;
    if (noise->given) {
        int policy = part == noise->iterations;
        int count = policy ? noise->policy_samples : noise->samples;
        int before = policy ? 0 : part;
        const float *walks = policy ? noise->given->policy : noise->given->samples;
        const float *ends = policy ? noise->given->policy_ends : noise->given->sample_ends;
        walks += before * noise->horizon * count * actions;
        ends += before * count * actions;
        for (int row = 0; row < rows; row++) {
            const float *from = row < steps ? walks + row / actions * count * actions : ends;
            for (int lane = 0; lane < vectors * WIDTH; lane++)
                to[row * TILE + lane] =
                    first + lane < count ? from[(first + lane) * actions + row % actions] : 0.0f;
        }
        return;
    }
    for (int block = 0; 4 * block < rows; block++)
        for (int v = 0; v < vectors; v++) {
            uint32_t words[4][WIDTH];
            vec normal[4];
            counted(words, &noise->key, part, block, first + v * WIDTH);
            box_muller(words[0], words[1], normal);
            box_muller(words[2], words[3], normal + 2);
            for (int row = 4 * block; row < rows && row < 4 * block + 4; row++)
                store(to + row * TILE + v * WIDTH, normal[row % 4]);
        }
}

/* A uniform number in [0, 1): which elite is executed. */
ALONE float draw_choice(const source *noise)
{
    uint32_t words[4][WIDTH];
    if (noise->given)
        return noise->given->choice[0];
    counted(words, &noise->key, noise->iterations + 1, 0, 0);
    return (float)(words[0][0] >> 8) * 5.96046448e-8f;
}

/* [A] normal numbers. */
ALONE float draw_exploration(const source *noise, int action)
{
    uint32_t words[4][WIDTH];
    vec normal[2];
    float first[WIDTH];
    if (noise->given)
        return noise->given->exploration[action];
    counted(words, &noise->key, noise->iterations + 2, action, 0);
    box_muller(words[0], words[1], normal);
    memcpy(first, normal, sizeof first);
    return first[0];
}

/* --- Networks: [unit][sample], a row of TILE samples for each unit ---------------------------- */

/* All but the observation and the results lie in the workspace. */
typedef struct {
    float *hidden[2]; /* [widest][TILE] */
    float *joint;     /* [D + A][TILE], the actions after the latent */
    float *result;    /* [TILE] twice: of a network with one output, and the smallest so far */
    float *known[2];  /* [widest]: what the latent adds in the first layers at the first step */
    float *decoded;   /* [PLANNER_ROWS][widest], of narrow weights; unused if WIDTH is 1 */
} buffers;

/* A float16. In software: the bits in their places are worth too little by 2^112, below the normal
 * numbers too. */
INLINE float half(uint16_t stored)
{
    float x;
#if defined(__ARM_FP) && defined(__ARM_ARCH_PROFILE) && __ARM_ARCH_PROFILE == 77 /* M */
    uint32_t all = stored;
    memcpy(&x, &all, sizeof x);
    __asm__("vcvtb.f32.f16 %0, %1" : "=t"(x) : "t"(x));
#else
    uint32_t all = (uint32_t)(stored & 0x7fff) << 13;
    memcpy(&x, &all, sizeof x);
    x *= 5.19229686e33f;
    memcpy(&all, &x, sizeof x);
    all |= (uint32_t)(stored & 0x8000) << 16;
    memcpy(&x, &all, sizeof x);
#endif
    return x;
}

/* Element `at` of stored weights; `type` is a constant where it is used. */
INLINE float element(const int type, const void *weight, int at, float scale)
{
    if (type == PLANNER_FLOAT16)
        return half(((const uint16_t *)weight)[at]);
    if (type == PLANNER_INT8)
        return (float)((const int8_t *)weight)[at] * scale;
    return ((const float *)weight)[at];
}

/* Some rows of a matrix, of some of its columns. */
typedef struct {
    const void *weight;
    const float *scale; /* of each row; int8 alone has them */
    int stride, columns, type;
} block;

static block rows_of(const planner_layer *layer, int row, int from, int to)
{
    static const int bytes[] = {4, 2, 1};
    int first = row * layer->inputs + from;
    block of = {(const char *)layer->weight + first * bytes[layer->type],
                layer->scale ? layer->scale + row : NULL, layer->inputs, to - from, layer->type};
    return of;
}

#if WIDTH > 1
/* As float32. */
static block decode(block of, int rows, float *decoded)
{
    block wide = {decoded, NULL, of.columns, of.columns, PLANNER_FLOAT32};
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < of.columns; k++)
            *decoded++ = of.type == PLANNER_FLOAT16
                             ? element(PLANNER_FLOAT16, of.weight, r * of.stride + k, 1.0f)
                             : element(PLANNER_INT8, of.weight, r * of.stride + k, of.scale[r]);
    return wide;
}
#endif

/* Some rows of a layer for some vectors of samples; the first three are constants where it is
 * used. */
INLINE void product(const int type, const int rows, const int vectors, const block *of,
                    const float *bias, const float *input, float *output)
{
    vec sum[PLANNER_ROWS][VECTORS];
    float scale[PLANNER_ROWS];
    UNROLLED for (int r = 0; r < rows; r++) {
        scale[r] = type == PLANNER_INT8 ? of->scale[r] : 1.0f;
        UNROLLED for (int v = 0; v < vectors; v++)
            sum[r][v] = spread(bias[r]);
    }
    for (int k = 0; k < of->columns; k++, input += TILE) {
        vec x[VECTORS];
        UNROLLED for (int v = 0; v < vectors; v++)
            x[v] = load(input + v * WIDTH);
        UNROLLED for (int r = 0; r < rows; r++) {
            vec w = spread(element(type, of->weight, r * of->stride + k, scale[r]));
            UNROLLED for (int v = 0; v < vectors; v++)
                sum[r][v] = multiply_add(w, x[v], sum[r][v]);
        }
    }
    UNROLLED for (int r = 0; r < rows; r++)
        UNROLLED for (int v = 0; v < vectors; v++)
            store(output + r * TILE + v * WIDTH, sum[r][v]);
}

INLINE void products(const int type, const int vectors, int rows, const block *of,
                     const float *bias, const float *input, float *output)
{
    switch (rows) { /* as many as there are, so that the compiler keeps all sums in registers */
    case 1: product(type, 1, vectors, of, bias, input, output); break;
    case 2: product(type, 2, vectors, of, bias, input, output); break;
    case 3: product(type, 3, vectors, of, bias, input, output); break;
    case 4: product(type, 4, vectors, of, bias, input, output); break;
#if PLANNER_ROWS > 4
    case 5: product(type, 5, vectors, of, bias, input, output); break;
    case 6: product(type, 6, vectors, of, bias, input, output); break;
#endif
#if PLANNER_ROWS > 6
    case 7: product(type, 7, vectors, of, bias, input, output); break;
    case 8: product(type, 8, vectors, of, bias, input, output); break;
#endif
    default: break;
    }
}

/* Some rows of a layer for all vectors of samples. */
INLINE void rows_times(const int type, int rows, const block *of, const float *bias,
                       const float *input, int vectors, float *output)
{
    int v = 0;
    for (; v + VECTORS <= vectors; v += VECTORS)
        products(type, VECTORS, rows, of, bias, input + v * WIDTH, output + v * WIDTH);
#if WIDTH > 1
    for (; v < vectors; v++)
        products(type, 1, rows, of, bias, input + v * WIDTH, output + v * WIDTH);
#else /* row by row: it is seldom, and code takes flash */
    for (int size = type == PLANNER_FLOAT32 ? 4 : type == PLANNER_FLOAT16 ? 2 : 1; v < vectors; v++)
        for (int r = 0; r < rows; r++) {
            block one = {(const char *)of->weight + r * of->stride * size,
                         of->scale ? of->scale + r : NULL, 0, of->columns, type};
            product(type, 1, 1, &one, bias + r, input + v, output + r * TILE + v);
        }
#endif
}

/* A linear layer on columns `from` to `to` of its inputs: [to - from][TILE] -> [outputs][TILE].
 * Where many samples share a weight, narrow ones are decoded once for all of them; one sample at a
 * time has registers left to decode them in. */
ALONE void linear(const planner_layer *layer, int from, int to, const float *bias,
                  const float *input, int vectors, float *output, const buffers *own)
{
    for (int row = 0; row < layer->outputs; row += PLANNER_ROWS) {
        int left = layer->outputs - row, rows = left < PLANNER_ROWS ? left : PLANNER_ROWS;
        block of = rows_of(layer, row, from, to);
        float *out = output + row * TILE;
#if WIDTH > 1
        if (of.type != PLANNER_FLOAT32)
            of = decode(of, rows, own->decoded);
#else
        (void)own;
        if (of.type == PLANNER_FLOAT16)
            rows_times(PLANNER_FLOAT16, rows, &of, bias + row, input, vectors, out);
        else if (of.type == PLANNER_INT8)
            rows_times(PLANNER_INT8, rows, &of, bias + row, input, vectors, out);
        else
#endif
            rows_times(PLANNER_FLOAT32, rows, &of, bias + row, input, vectors, out);
    }
}

ALONE void elu_rows(float *x, int rows, int vectors)
{
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) {
            float *at = x + row * TILE + v * WIDTH;
            store(at, elu(load(at)));
        }
}

ALONE void tanh_rows(float *x, int rows, int vectors)
{
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) {
            float *at = x + row * TILE + v * WIDTH;
            store(at, hyperbolic_tangent(load(at)));
        }
}

/* LayerNorm over the units, then tanh. */
ALONE void norm_tanh(const planner_q *q, float *x, int vectors)
{
    int rows = q->first.outputs;
    float share = 1.0f / (float)rows;
    for (int v = 0; v < vectors; v++) {
        vec mean = spread(0.0f), variance = spread(0.0f);
        for (int row = 0; row < rows; row++)
            mean += load(x + row * TILE + v * WIDTH);
        mean *= share;
        for (int row = 0; row < rows; row++) {
            vec off = load(x + row * TILE + v * WIDTH) - mean;
            variance = multiply_add(off, off, variance);
        }
        vec scale = 1.0f / root(variance * share + 1e-5f);
        for (int row = 0; row < rows; row++) {
            float *at = x + row * TILE + v * WIDTH;
            vec normal = (load(at) - mean) * scale;
            normal = multiply_add(normal, spread(q->norm_weight[row]), spread(q->norm_bias[row]));
            store(at, hyperbolic_tangent(normal));
        }
    }
}

/* Linear, ELU, linear, ELU, linear. Where `known` is given, it is what the first layer's bias and
 * its first `from` inputs add up to. */
static void mlp(const planner_layer *layers, int from, const float *known, const float *input,
                int vectors, float *output, const buffers *own)
{
    const planner_layer *first = layers, *second = layers + 1, *third = layers + 2;
    linear(first, from, first->inputs, known ? known : first->bias, input, vectors, own->hidden[0],
           own);
    elu_rows(own->hidden[0], first->outputs, vectors);
    linear(second, 0, second->inputs, second->bias, own->hidden[0], vectors, own->hidden[1], own);
    elu_rows(own->hidden[1], second->outputs, vectors);
    linear(third, 0, third->inputs, third->bias, own->hidden[1], vectors, output, own);
}

/* The latent of the observation, in all samples of one vector of `joint`. */
static void encode(const planner_model *model, const float *observation, const buffers *own)
{
    const planner_layer *first = model->encoder, *second = model->encoder + 1;
    for (int row = 0; row < model->observation; row++)
        store(own->hidden[1] + row * TILE, spread(observation[row]));
    linear(first, 0, first->inputs, first->bias, own->hidden[1], 1, own->hidden[0], own);
    elu_rows(own->hidden[0], first->outputs, 1);
    linear(second, 0, second->inputs, second->bias, own->hidden[0], 1, own->joint, own);
}

/* What the latent that all samples share adds in a first layer. */
static void add_latent(const planner_layer *first, int latent, float *known, const buffers *own)
{
    linear(first, 0, latent, first->bias, own->joint, 1, own->hidden[0], own);
    for (int row = 0; row < first->outputs; row++)
        known[row] = own->hidden[0][row * TILE];
}

/* The policy's action for the latent in `joint`, put behind it. `noise`: [A][TILE] or NULL. */
static void act(const planner_model *model, const planner_config *config, const float *noise,
                int vectors, const buffers *own)
{
    float *action = own->joint + model->latent * TILE;
    mlp(model->policy, 0, NULL, own->joint, vectors, action, own);
    tanh_rows(action, model->action, vectors);
    if (!noise)
        return;
    for (int row = 0; row < model->action; row++)
        for (int v = 0; v < vectors; v++) {
            float *at = action + row * TILE + v * WIDTH;
            vec more = load(noise + row * TILE + v * WIDTH) * config->policy_noise;
            more = clamp(more, -config->policy_noise_clip, config->policy_noise_clip);
            store(at, clamp(load(at) + more, -1.0f, 1.0f));
        }
}

/* The smallest of the members' values for `joint`, in `result`. */
static void min_q(const planner_model *model, int vectors, const buffers *own)
{
    float *value = own->result + TILE, *smallest = own->result;
    for (int member = 0; member < model->members; member++) {
        const planner_q *q = model->q_ensemble + member;
        linear(&q->first, 0, q->first.inputs, q->first.bias, own->joint, vectors, own->hidden[0],
               own);
        norm_tanh(q, own->hidden[0], vectors);
        linear(&q->second, 0, q->second.inputs, q->second.bias, own->hidden[0], vectors,
               own->hidden[1], own);
        elu_rows(own->hidden[1], q->second.outputs, vectors);
        linear(&q->third, 0, q->third.inputs, q->third.bias, own->hidden[1], vectors,
               member ? value : smallest, own);
        for (int v = 0; member && v < vectors; v++) {
            vec ours = load(smallest + v * WIDTH), theirs = load(value + v * WIDTH);
            store(smallest + v * WIDTH, where_less(ours, theirs, ours, theirs));
        }
    }
}

/* --- The planner ------------------------------------------------------------------------------ */

typedef struct {
    float *actions[2]; /* [H * A][N] and [H * A][P], rows rounded up to whole vectors */
    float *values;     /* [N + P] */
    float *scores;     /* [K], rounded up; before that, the elites' values */
    int32_t *elites;   /* [K], which trajectories they are, best first */
    float *mean, *std; /* [H * A] */
    float *latent;     /* [D] */
    float *normal;     /* [(H + 1) * A][TILE] */
    float *rewards;    /* [H][TILE] */
    buffers networks;
} workspace_parts;

static int widest_of(int widest, const planner_layer *layers, int count)
{
    for (int i = 0; i < count; i++) {
        widest = layers[i].outputs > widest ? layers[i].outputs : widest;
        widest = layers[i].inputs > widest ? layers[i].inputs : widest;
    }
    return widest;
}

static int widest(const planner_model *model)
{
    int found = widest_of(0, model->encoder, 2);
    found = widest_of(found, model->dynamics, 3);
    found = widest_of(found, model->reward, 3);
    found = widest_of(found, model->policy, 3);
    for (int member = 0; member < model->members; member++) {
        found = widest_of(found, &model->q_ensemble[member].first, 1);
        found = widest_of(found, &model->q_ensemble[member].second, 1);
    }
    return found;
}

static int is_small(const planner_model *model)
{
    return model->policy[0].type != PLANNER_FLOAT32;
}

size_t planner_workspace(const planner_model *model, const planner_config *config)
{
    return PLANNER_WORKSPACE(widest(model), model->latent, model->action, config->horizon,
                             config->samples, config->policy_samples, config->elites,
                             is_small(model));
}

int planner_width(void) { return WIDTH; }

INLINE float *take(float **free_from, int count)
{
    float *taken = *free_from;
    *free_from += count;
    return taken;
}

/* Where everything lies; what vectors are loaded from comes first, aligned. */
static void lay_out(const planner_model *model, int horizon, int samples, int policy_samples,
                    int elites, void *workspace, workspace_parts *parts)
{
    uintptr_t past = (uintptr_t)workspace % sizeof(vec);
    float *from = (float *)(void *)((char *)workspace + (past ? sizeof(vec) - past : 0));
    int wide = widest(model), steps = horizon * model->action;
    buffers *own = &parts->networks;
    own->hidden[0] = take(&from, wide * TILE);
    own->hidden[1] = take(&from, wide * TILE);
    own->joint = take(&from, (model->latent + model->action) * TILE);
    own->result = take(&from, 2 * TILE);
    parts->normal = take(&from, (steps + model->action) * TILE);
    parts->rewards = take(&from, horizon * TILE);
    parts->actions[0] = take(&from, steps * PLANNER_ROUND(samples));
    parts->actions[1] = take(&from, steps * PLANNER_ROUND(policy_samples));
    parts->scores = take(&from, PLANNER_ROUND(elites));
    parts->elites = (int32_t *)(void *)take(&from, PLANNER_ROUND(elites));
    parts->mean = take(&from, PLANNER_ROUND(steps));
    parts->std = take(&from, PLANNER_ROUND(steps));
    parts->latent = take(&from, PLANNER_ROUND(model->latent));
    own->known[0] = take(&from, PLANNER_ROUND(wide));
    own->known[1] = take(&from, PLANNER_ROUND(wide));
    own->decoded = from;
    from += is_small(model) ? PLANNER_DECODED(wide) : 0;
    parts->values = from;
}

static int layers_fit(const planner_layer *layers, int count, int inputs, int outputs)
{
    for (int i = 0; i < count; i++) {
        if (layers[i].inputs != inputs || layers[i].outputs < 1)
            return 0;
        inputs = layers[i].outputs;
    }
    return inputs == outputs;
}

static int policy_fits(const planner_model *model)
{
    return model->observation >= 1 && model->action >= 1 && model->latent >= 1
           && layers_fit(model->encoder, 2, model->observation, model->latent)
           && layers_fit(model->policy, 3, model->latent, model->action);
}

static int model_fits(const planner_model *model)
{
    int joint = model->latent + model->action;
    int fits = policy_fits(model) && model->members >= 1
               && layers_fit(model->dynamics, 3, joint, model->latent)
               && layers_fit(model->reward, 3, joint, 1);
    for (int member = 0; fits && member < model->members; member++) {
        const planner_q *q = model->q_ensemble + member;
        fits = layers_fit(&q->first, 1, joint, q->first.outputs)
               && layers_fit(&q->second, 1, q->first.outputs, q->second.outputs)
               && layers_fit(&q->third, 1, q->second.outputs, 1);
    }
    return fits;
}

static int config_fits(const planner_config *config)
{
    return config->horizon >= 1 && config->means >= config->horizon && config->iterations >= 1
           && config->samples >= 1 && config->policy_samples >= 0 && config->elites >= 1
           && config->elites <= config->samples;
}

static int is_finite(const float *x, int count)
{
    for (int i = 0; i < count; i++)
        if (!(x[i] - x[i] == 0.0f))
            return 0;
    return 1;
}

/* The values [count] of trajectories that the planner samples, or that the noisy policy takes
 * (part I); their actions are kept. */
static void follow(const planner_model *model, const planner_config *config, const source *noise,
                   int part, const workspace_parts *parts, float *values)
{
    const buffers *own = &parts->networks;
    int policy = part == config->iterations, latent = model->latent, width = model->action;
    int count = policy ? config->policy_samples : config->samples, length = PLANNER_ROUND(count);
    float *action = own->joint + latent * TILE, *kept = parts->actions[policy];

    for (int first = 0; first < count; first += TILE) {
        int left = length - first, vectors = (left < TILE ? left : TILE) / WIDTH;
        draw(noise, part, first, vectors, parts->normal);
        for (int row = 0; policy && row < latent; row++)
            for (int v = 0; v < vectors; v++)
                store(own->joint + row * TILE + v * WIDTH, spread(parts->latent[row]));

        for (int t = 0; t < config->horizon; t++) {
            const float *normal = parts->normal + t * width * TILE;
            if (policy)
                act(model, config, normal, vectors, own);
            for (int row = 0; row < width; row++)
                for (int v = 0; v < vectors; v++) {
                    int at = row * TILE + v * WIDTH, step = t * width + row;
                    if (!policy)
                        store(action + at, clamp(spread(parts->mean[step])
                                                     + load(normal + at) * parts->std[step],
                                                 -1.0f, 1.0f));
                    store(kept + step * length + first + v * WIDTH, load(action + at));
                }
            /* At the first step all samples share the latent: what it adds is known. */
            int from = policy || t ? 0 : latent;
            const float *input = own->joint + from * TILE;
            mlp(model->reward, from, from ? own->known[1] : NULL, input, vectors,
                parts->rewards + t * TILE, own);
            mlp(model->dynamics, from, from ? own->known[0] : NULL, input, vectors, own->joint,
                own);
        }
        act(model, config, parts->normal + config->horizon * width * TILE, vectors, own);
        min_q(model, vectors, own);

        for (int lane = 0; lane < TILE && first + lane < count; lane++) {
            float value = own->result[lane];
            for (int t = config->horizon - 1; t >= 0; t--)
                value = parts->rewards[t * TILE + lane] + config->discount * value;
            value = value > FLT_MAX ? FLT_MAX : value < -FLT_MAX ? -FLT_MAX : value;
            values[first + lane] = value == value ? value : 0.0f;
        }
    }
}

/* The elites, best first, and their values; of equal ones the first. */
ALONE void top(const float *values, int count, int elites, int32_t *which, float *best)
{
    int found = 0;
    for (int i = 0; i < count; i++) {
        if (found == elites && !(values[i] > best[found - 1]))
            continue;
        int place = found < elites ? found++ : found - 1;
        for (; place > 0 && values[i] > best[place - 1]; place--) {
            best[place] = best[place - 1];
            which[place] = which[place - 1];
        }
        best[place] = values[i];
        which[place] = i;
    }
}

/* Values, best first -> scores that add up to one. */
ALONE void softmax(float *scores, int count, float temperature)
{
    float sum = 0.0f, best = temperature * scores[0];
    for (int k = count; k < PLANNER_ROUND(count); k++)
        scores[k] = scores[count - 1];
    for (int k = 0; k < count; k += WIDTH) {
        vec scale, rest = exponential(load(scores + k) * temperature - best, &scale);
        store(scores + k, scale + scale * rest);
    }
    for (int k = 0; k < count; k++)
        sum += scores[k];
    for (int k = 0; k < count; k++)
        scores[k] /= sum;
}

/* Action element `step` (t * A + a) of an elite. */
static float elite_action(const workspace_parts *parts, const planner_config *config, int k,
                          int step)
{
    int which = parts->elites[k], policy = which - config->samples;
    return policy < 0 ? parts->actions[0][step * PLANNER_ROUND(config->samples) + which]
                      : parts->actions[1][step * PLANNER_ROUND(config->policy_samples) + policy];
}

/* Mean and std of the sampling distribution for action element `step`. */
static void refit(const workspace_parts *parts, const planner_config *config, int step)
{
    float mean = 0.0f, variance = 0.0f, std[WIDTH];
    for (int k = 0; k < config->elites; k++)
        mean += parts->scores[k] * elite_action(parts, config, k, step);
    for (int k = 0; k < config->elites; k++) {
        float deviation = elite_action(parts, config, k, step) - mean;
        variance += parts->scores[k] * (deviation * deviation);
    }
    vec all = root(spread(variance));
    memcpy(std, &all, sizeof std);
    std[0] = std[0] > config->max_std ? config->max_std : std[0];
    parts->std[step] = std[0] < config->min_std ? config->min_std : std[0];
    parts->mean[step] = config->momentum * parts->mean[step] + (1.0f - config->momentum) * mean;
}

int planner_plan(const planner_model *model, const planner_config *config,
                 const float *observation, const float *previous_means, const planner_noise *noise,
                 const planner_key *key, int explore, const planner_decision *decision,
                 void *workspace)
{
    workspace_parts parts;
    source random = {noise,           {0, 0, 0},       config->horizon,       model->action,
                     config->iterations, config->samples, config->policy_samples};
    int width = model->action, steps = config->horizon * width, rows = config->means * width;
    int count = config->samples + config->policy_samples, chosen = 0;
    float cumulative = 0.0f, value = 0.0f, choice;
    if (!model_fits(model) || !config_fits(config))
        return PLANNER_BAD_SIZES;
    if (!is_finite(observation, model->observation))
        return PLANNER_NOT_FINITE;
    if (key)
        random.key = *key;
    lay_out(model, config->horizon, config->samples, config->policy_samples, config->elites,
            workspace, &parts);

    encode(model, observation, &parts.networks);
    for (int row = 0; row < model->latent; row++)
        parts.latent[row] = parts.networks.joint[row * TILE];
    add_latent(model->dynamics, model->latent, parts.networks.known[0], &parts.networks);
    add_latent(model->reward, model->latent, parts.networks.known[1], &parts.networks);

    /* Policy trajectories: the same in every iteration, so their values are, too. */
    follow(model, config, &random, config->iterations, &parts, parts.values + config->samples);

    /* Warm start: the previous mean, one decision later. */
    for (int step = 0; step < steps; step++) {
        parts.mean[step] = step + width < rows ? previous_means[step + width] : 0.0f;
        parts.std[step] = config->max_std;
    }

    for (int i = 0; i < config->iterations; i++) {
        /* Sample action sequences and value them, together with the policy's. */
        follow(model, config, &random, i, &parts, parts.values);
        if (decision->values)
            memcpy(decision->values + i * count, parts.values, sizeof(float) * (size_t)count);

        /* Elites and their scores. */
        top(parts.values, count, config->elites, parts.elites, parts.scores);
        for (int k = 0; k < config->elites && i == config->iterations - 1; k++)
            value += parts.scores[k];
        softmax(parts.scores, config->elites, config->temperature);

        /* Refit the distribution. */
        for (int step = 0; step < steps; step++)
            refit(&parts, config, step);
    }

    /* Execute an elite's first action, drawn by score. */
    choice = draw_choice(&random);
    for (int k = 0; k < config->elites; k++) {
        cumulative += parts.scores[k];
        chosen += cumulative < choice;
    }
    chosen = chosen < config->elites ? chosen : config->elites - 1;
    for (int a = 0; a < width; a++) {
        float action = elite_action(&parts, config, chosen, a);
        if (explore) {
            action += parts.std[a] * draw_exploration(&random, a);
            action = action < -1.0f ? -1.0f : action > 1.0f ? 1.0f : action;
        }
        decision->action[a] = action;
    }
    for (int step = 0; step < rows; step++)
        decision->means[step] = step < steps ? parts.mean[step] : 0.0f;
    if (decision->std)
        memcpy(decision->std, parts.std, sizeof(float) * (size_t)width);
    if (decision->value)
        *decision->value = value / (float)config->elites;
    if (decision->scores)
        memcpy(decision->scores, parts.scores, sizeof(float) * (size_t)config->elites);
    return PLANNER_OK;
}

int planner_policy(const planner_model *model, const float *observation, float *action,
                   void *workspace)
{
    workspace_parts parts;
    if (!policy_fits(model))
        return PLANNER_BAD_SIZES;
    if (!is_finite(observation, model->observation))
        return PLANNER_NOT_FINITE;
    lay_out(model, 1, 1, 0, 1, workspace, &parts);
    encode(model, observation, &parts.networks);
    act(model, NULL, NULL, 1, &parts.networks);
    for (int a = 0; a < model->action; a++)
        action[a] = parts.networks.joint[(model->latent + a) * TILE];
    return PLANNER_OK;
}

int planner_draw(const planner_model *model, const planner_config *config, const planner_key *key,
                 const planner_noise *noise, void *workspace)
{
    workspace_parts parts;
    int width = model->action, steps = config->horizon * width;
    source random = {NULL, *key, config->horizon, width,
                     config->iterations, config->samples, config->policy_samples};
    if (!model_fits(model) || !config_fits(config))
        return PLANNER_BAD_SIZES;
    lay_out(model, config->horizon, config->samples, config->policy_samples, config->elites,
            workspace, &parts);
    for (int part = 0; part <= config->iterations; part++) {
        int policy = part == config->iterations, before = policy ? 0 : part;
        int count = policy ? config->policy_samples : config->samples;
        float *walks = policy ? noise->policy : noise->samples + before * steps * count;
        float *ends = policy ? noise->policy_ends : noise->sample_ends + before * count * width;
        for (int first = 0; first < count; first += TILE) {
            draw(&random, part, first, TILE / WIDTH, parts.normal);
            for (int row = 0; row < steps + width; row++) {
                float *to = row < steps ? walks + row / width * count * width : ends;
                for (int lane = 0; lane < TILE && first + lane < count; lane++)
                    to[(first + lane) * width + row % width] = parts.normal[row * TILE + lane];
            }
        }
    }
    noise->choice[0] = draw_choice(&random);
    for (int a = 0; a < width; a++)
        noise->exploration[a] = draw_exploration(&random, a);
    return PLANNER_OK;
}

#endif
