/* The gradients of a TD-MPC agent's two losses, Adam, and the targets' moving average.
 *
 * What `model_loss` and `policy_loss` of agent/learner.py compute, with the same names in the same
 * order, and their gradients written out by hand. Each call takes a batch through all of a loss,
 * forward and back, LANES sequences at a time, so that what one of them needs stays in the cache.
 *
 * Sizes: B sequences of H decisions, O observation, A action, D latent. Arrays from outside are row
 * by row, as in PyTorch; those of the workspace are tiles, [unit][lane] with a lane for a sequence,
 * and [step] before it where each time step has one.
 */
#define PLANNER_ARITHMETIC /* alone: an exported planner is to stay in one file */
#include "planner.c"

#define LANES (2 * WIDTH)
#define ROWS PLANNER_ROWS /* of a matrix that are multiplied at once */
#define DEPTH 3
#define LARGEST_LOSS 1e4f /* each loss term of a sequence, and its priority, is cut off here */

/* A linear layer and what follows it: LayerNorm and tanh where it has norm weights, else ELU; nothing
 * after the last of a network. */
typedef struct {
    const float *weight, *bias, *norm_weight, *norm_bias; /* [outputs][inputs], [outputs] */
    float *gradients[4];                                  /* of those */
    int outputs, inputs;
    /* In the workspace: */
    float *transposed;   /* [inputs][outputs], the weights */
    float *weight_sums;  /* [strip of LANES inputs][outputs][LANES], the gradient so far */
    float *sums[3];      /* [outputs][WIDTH], likewise of the others */
    float *output;       /* [step] */
    float *normal;       /* [step], normalised */
    float *scale;        /* [step][LANES], 1 / std */
    float *slope;        /* [step], the loss's gradient before LayerNorm or ELU */
} layer;

typedef struct {
    layer layers[DEPTH];
    int depth;
} network;

typedef struct {
    int observation, action, latent, members, horizon, size; /* O, A, D, Qs, H, B */
    float discount, rho, consistency_weight, reward_weight, value_weight;
    network encoder, dynamics, reward, policy, target_encoder;
    network *q_ensemble, *target_q_ensemble; /* [members] */
    /* In the workspace: */
    float *joint;        /* [tile][H + 1]: latent, then action */
    float *latent_slope; /* [H + 1] */
    float *action_slope; /* [H + 1] */
    float *observed;     /* an observation */
    float *imagined;     /* a latent, then an action: after each decision, for its TD target */
    float *goal;         /* [H]: latents that the targets see */
    float *noise;        /* [H + 1] */
    float *td_target;    /* [H][LANES] */
    float *strip;        /* [H + 1][LANES][LANES], transposed */
} learner;

/* As in replay.py. */
typedef struct {
    const float *observation, *actions, *rewards, *next_observations, *terminated, *valid, *weights;
} learner_batch;

/* --- Products --------------------------------------------------------------------------------- */

/* What vectors are multiplied by: the rows of a matrix, of columns that lie in blocks. */
typedef struct {
    const float *first;
    int across, blocks, next, columns; /* from row to row; of them; from block to block; of each */
} factors;

/* Some rows times [columns][LANES] -> [rows][LANES], which begin with `bias`, or as they are. */
INLINE void product(const int rows, const int vectors, const factors *of, const float *bias,
                    const float *input, float *output)
{
    vec sum[ROWS][2];
    UNROLLED for (int r = 0; r < rows; r++)
        UNROLLED for (int v = 0; v < vectors; v++)
            sum[r][v] = bias ? spread(bias[r]) : load(output + r * LANES + v * WIDTH);
    for (int block = 0; block < of->blocks; block++) {
        const float *from = of->first + (long)block * of->next;
        for (int k = 0; k < of->columns; k++, input += LANES) {
            vec x[2];
            UNROLLED for (int v = 0; v < vectors; v++)
                x[v] = load(input + v * WIDTH);
            UNROLLED for (int r = 0; r < rows; r++) {
                vec w = spread(from[r * of->across + k]);
                UNROLLED for (int v = 0; v < vectors; v++)
                    sum[r][v] = multiply_add(w, x[v], sum[r][v]);
            }
        }
    }
    UNROLLED for (int r = 0; r < rows; r++)
        UNROLLED for (int v = 0; v < vectors; v++)
            store(output + r * LANES + v * WIDTH, sum[r][v]);
}

INLINE void some_rows(int rows, const int vectors, const factors *of, const float *bias,
                      const float *input, float *output)
{
    switch (rows) { /* as many as there are, so that the compiler keeps all sums in registers */
    case 1: product(1, vectors, of, bias, input, output); break;
    case 2: product(2, vectors, of, bias, input, output); break;
    case 3: product(3, vectors, of, bias, input, output); break;
    case 4: product(4, vectors, of, bias, input, output); break;
#if PLANNER_ROWS > 4
    case 5: product(5, vectors, of, bias, input, output); break;
    case 6: product(6, vectors, of, bias, input, output); break;
#endif
#if PLANNER_ROWS > 6
    case 7: product(7, vectors, of, bias, input, output); break;
    case 8: product(8, vectors, of, bias, input, output); break;
#endif
    default: break;
    }
}

ALONE void all_rows(int rows, int vectors, factors of, const float *bias, const float *input,
                    float *output)
{
    for (int row = 0; row < rows; row += ROWS) {
        int some = rows - row < ROWS ? rows - row : ROWS;
        if (vectors == 2)
            some_rows(some, 2, &of, bias ? bias + row : NULL, input, output + row * LANES);
        else
            some_rows(some, 1, &of, bias ? bias + row : NULL, input, output + row * LANES);
        of.first += (long)ROWS * of.across;
    }
}

INLINE factors matrix(const float *first, int columns)
{
    factors of = {first, columns, 1, 0, columns};
    return of;
}

/* --- Networks --------------------------------------------------------------------------------- */

INLINE float *at(float *tiles, int step, int units) { return tiles + (long)step * units * LANES; }

static void elu_tile(float *x, int units, int vectors)
{
    for (int i = 0; i < units; i++)
        for (int v = 0; v < vectors; v++) {
            float *own = x + i * LANES + v * WIDTH;
            store(own, elu(load(own)));
        }
}

/* The gradient after ELU to the one before it, by ELU's value y: 1, or e^x = y + 1. */
static void elu_slopes(const float *y, float *slope, int units, int vectors)
{
    for (int i = 0; i < units; i++)
        for (int v = 0; v < vectors; v++) {
            long own = i * LANES + v * WIDTH;
            vec value = load(y + own), zero = spread(0.0f);
            vec rise = where_less(zero, value, spread(1.0f), value + 1.0f);
            store(slope + own, load(slope + own) * rise);
        }
}

static void norm_tanh_tile(const layer *own, int step, int vectors)
{
    float *x = at(own->output, step, own->outputs), *normal = at(own->normal, step, own->outputs);
    float share = 1.0f / (float)own->outputs;
    for (int v = 0; v < vectors; v++) {
        vec mean = spread(0.0f), variance = spread(0.0f);
        for (int i = 0; i < own->outputs; i++)
            mean += load(x + i * LANES + v * WIDTH);
        mean *= share;
        for (int i = 0; i < own->outputs; i++) {
            vec off = load(x + i * LANES + v * WIDTH) - mean;
            variance = multiply_add(off, off, variance);
        }
        vec scale = 1.0f / root(variance * share + 1e-5f);
        store(own->scale + step * LANES + v * WIDTH, scale);
        for (int i = 0; i < own->outputs; i++) {
            long place = i * LANES + v * WIDTH;
            vec n = (load(x + place) - mean) * scale;
            store(normal + place, n);
            vec y = multiply_add(n, spread(own->norm_weight[i]), spread(own->norm_bias[i]));
            store(x + place, hyperbolic_tangent(y));
        }
    }
}

static void norm_tanh_slopes(const layer *own, int step, int vectors)
{
    const float *y = at(own->output, step, own->outputs);
    const float *normal = at(own->normal, step, own->outputs);
    float *slope = at(own->slope, step, own->outputs), share = 1.0f / (float)own->outputs;
    for (int v = 0; v < vectors; v++) {
        vec mean = spread(0.0f), along = spread(0.0f);
        for (int i = 0; i < own->outputs; i++) {
            long place = i * LANES + v * WIDTH;
            float *of_weight = own->sums[1] + i * WIDTH, *of_bias = own->sums[2] + i * WIDTH;
            vec value = load(y + place), n = load(normal + place);
            vec g = load(slope + place) * (1.0f - value * value);
            store(of_weight, multiply_add(g, n, load(of_weight)));
            store(of_bias, load(of_bias) + g);
            g *= own->norm_weight[i];
            mean += g;
            along = multiply_add(g, n, along);
            store(slope + place, g);
        }
        mean *= share;
        along *= share;
        vec scale = load(own->scale + step * LANES + v * WIDTH);
        for (int i = 0; i < own->outputs; i++) {
            long place = i * LANES + v * WIDTH;
            vec off = load(slope + place) - mean - load(normal + place) * along;
            store(slope + place, off * scale);
        }
    }
}

/* [inputs][LANES] -> [outputs][LANES], into `output` or the last layer's own. */
static void forward(const network *net, int step, int vectors, const float *input, float *output)
{
    for (int i = 0; i < net->depth; i++) {
        const layer *own = net->layers + i;
        int last = i + 1 == net->depth;
        float *to = last && output ? output : at(own->output, step, own->outputs);
        all_rows(own->outputs, vectors, matrix(own->weight, own->inputs), own->bias, input, to);
        if (own->norm_weight)
            norm_tanh_tile(own, step, vectors);
        else if (!last)
            elu_tile(to, own->outputs, vectors);
        input = to;
    }
}

/* From the last layer's slope to those of all below. */
static void backward(const network *net, int step, int vectors)
{
    for (int i = net->depth - 1; i > 0; i--) {
        const layer *own = net->layers + i, *below = own - 1;
        float *slope = at(below->slope, step, below->outputs);
        memset(slope, 0, sizeof(float) * (size_t)(below->outputs * LANES));
        all_rows(below->outputs, vectors, matrix(own->transposed, own->outputs), NULL,
                 at(own->slope, step, own->outputs), slope);
        if (below->norm_weight)
            norm_tanh_slopes(below, step, vectors);
        else
            elu_slopes(at(below->output, step, below->outputs), slope, below->outputs, vectors);
    }
}

/* Add the gradient of `count` of the network's inputs. */
static void backward_to_inputs(const network *net, int step, int vectors, int from, int count,
                               float *slope)
{
    const layer *own = net->layers;
    factors of = matrix(own->transposed + (long)from * own->outputs, own->outputs);
    all_rows(count, vectors, of, NULL, at(own->slope, step, own->outputs), slope);
}

/* Add the gradients of all weights, from the slopes of `steps` steps and the network's inputs,
 * which are tiles of `inputs` units. */
static void sum_gradients(const network *net, int steps, int vectors, float *input, int inputs,
                          float *strip)
{
    int columns = vectors * WIDTH;
    for (int i = 0; i < net->depth; i++) {
        const layer *own = net->layers + i;
        factors slopes = {own->slope, LANES, steps, own->outputs * LANES, columns};
        for (int first = 0; first < own->inputs; first += LANES) {
            int left = own->inputs - first, wide = left > WIDTH ? 2 : 1;
            int used = left < LANES ? left : LANES;
            for (int step = 0; step < steps; step++)
                for (int k = 0; k < used; k++) {
                    const float *row = at(input, step, inputs) + (first + k) * LANES;
                    float *to = strip + (long)step * columns * LANES + k;
                    for (int lane = 0; lane < columns; lane++)
                        to[lane * LANES] = row[lane];
                }
            all_rows(own->outputs, wide, slopes, NULL, strip,
                     own->weight_sums + (long)first * own->outputs);
        }
        for (int unit = 0; unit < own->outputs; unit++) {
            float *sum = own->sums[0] + unit * WIDTH;
            vec all = load(sum);
            for (int step = 0; step < steps; step++)
                for (int v = 0; v < vectors; v++)
                    all += load(at(own->slope, step, own->outputs) + unit * LANES + v * WIDTH);
            store(sum, all);
        }
        input = own->output, inputs = own->outputs;
    }
}

/* Before a call: the weights as they are now, turned round, and gradients of nothing. */
static void prepare(const network *net)
{
    for (int i = 0; i < net->depth; i++) {
        const layer *own = net->layers + i;
        int strips = (own->inputs + LANES - 1) / LANES;
        for (int o = 0; o < own->outputs; o++)
            for (int k = 0; k < own->inputs; k++)
                own->transposed[(long)k * own->outputs + o] = own->weight[(long)o * own->inputs + k];
        memset(own->weight_sums, 0, sizeof(float) * (size_t)(strips * own->outputs * LANES));
        for (int part = 0; part < 3; part++)
            memset(own->sums[part], 0, sizeof(float) * (size_t)(own->outputs * WIDTH));
    }
}

static void write_gradients(const network *net)
{
    for (int i = 0; i < net->depth; i++) {
        const layer *own = net->layers + i;
        for (int o = 0; o < own->outputs; o++) {
            for (int k = 0; k < own->inputs; k++) {
                const float *strip = own->weight_sums + (long)(k - k % LANES) * own->outputs;
                own->gradients[0][(long)o * own->inputs + k] = strip[o * LANES + k % LANES];
            }
            for (int part = 0; part < (own->norm_weight ? 3 : 1); part++) {
                float sum = 0.0f;
                for (int lane = 0; lane < WIDTH; lane++)
                    sum += own->sums[part][o * WIDTH + lane];
                own->gradients[1 + part][o] = sum;
            }
        }
    }
}

/* --- The workspace ---------------------------------------------------------------------------- */

/* The next `count` floats after `base`, or nothing but their number in `used` if there is no base. */
static float *take(float *base, size_t *used, size_t count)
{
    size_t before = *used;
    *used += (count + 15) / 16 * 16;
    return base ? base + before : NULL;
}

static void lay_out(network *net, int steps, float *base, size_t *used, float *const *slopes)
{
    for (int i = 0; i < net->depth; i++) {
        layer *own = net->layers + i;
        size_t outputs = (size_t)own->outputs, tiles = (size_t)steps * outputs * LANES;
        size_t inputs = (size_t)(own->inputs + LANES - 1) / LANES * LANES;
        own->transposed = take(base, used, outputs * inputs);
        own->weight_sums = take(base, used, outputs * inputs);
        for (int part = 0; part < 3; part++)
            own->sums[part] = take(base, used, outputs * WIDTH);
        own->output = take(base, used, tiles);
        own->normal = take(base, used, own->norm_weight ? tiles : 0);
        own->scale = take(base, used, own->norm_weight ? (size_t)steps * LANES : 0);
        own->slope = i + 1 == net->depth ? own->output : slopes[i];
    }
}

static int wider(int widest, const network *net)
{
    for (int i = 0; i < net->depth; i++)
        widest = net->layers[i].outputs > widest ? net->layers[i].outputs : widest;
    return widest;
}

/* Floats of workspace that a learner needs; its pointers into it are set if there is one, aligned
 * to 64 bytes. */
size_t learner_workspace(learner *own, float *base)
{
    size_t used = 0, lanes = LANES, steps = (size_t)own->horizon + 1;
    size_t tiles = ((size_t)own->size + lanes - 1) / lanes;
    size_t latent = (size_t)own->latent, action = (size_t)own->action;
    int widest = wider(wider(wider(1, &own->encoder), &own->dynamics), &own->reward);
    widest = wider(widest, &own->policy);
    for (int i = 0; i < own->members; i++)
        widest = wider(widest, own->q_ensemble + i);
    float *slopes[DEPTH];
    for (int i = 0; i < DEPTH; i++)
        slopes[i] = take(base, &used, steps * (size_t)widest * lanes);
    own->joint = take(base, &used, tiles * steps * (latent + action) * lanes);
    own->latent_slope = take(base, &used, steps * latent * lanes);
    own->action_slope = take(base, &used, steps * action * lanes);
    own->observed = take(base, &used, (size_t)own->observation * lanes);
    own->imagined = take(base, &used, (latent + action) * lanes);
    own->goal = take(base, &used, steps * latent * lanes);
    own->noise = take(base, &used, steps * action * lanes);
    own->td_target = take(base, &used, steps * lanes);
    own->strip = take(base, &used, steps * lanes * lanes);
    network *once[] = {&own->encoder, &own->target_encoder};
    network *often[] = {&own->dynamics, &own->reward, &own->policy};
    for (int i = 0; i < 2; i++)
        lay_out(once[i], 1, base, &used, slopes);
    for (int i = 0; i < 3; i++)
        lay_out(often[i], (int)steps, base, &used, slopes);
    for (int i = 0; i < own->members; i++) {
        lay_out(own->q_ensemble + i, (int)steps, base, &used, slopes);
        lay_out(own->target_q_ensemble + i, 1, base, &used, slopes);
    }
    /* What is learnt of latents arrives where it is summed. */
    own->encoder.layers[own->encoder.depth - 1].slope = own->latent_slope;
    own->dynamics.layers[own->dynamics.depth - 1].slope =
        base ? at(own->latent_slope, 1, own->latent) : NULL;
    return used;
}

/* --- The losses ------------------------------------------------------------------------------- */

/* Columns of `count` sequences from `first` on, as a tile; the other lanes are zero. */
static void read_tile(float *tile, const float *from, int width, int first, int count)
{
    memset(tile, 0, sizeof(float) * (size_t)(width * LANES));
    for (int lane = 0; lane < count; lane++)
        for (int i = 0; i < width; i++)
            tile[i * LANES + lane] = from[(long)(first + lane) * width + i];
}

/* The policy's action [A] for a latent, behind it in `joint`. */
static void act(const learner *own, int step, int vectors, const float *noise, float *joint)
{
    const layer *last = own->policy.layers + own->policy.depth - 1;
    float *action = at(last->output, step, own->action), *to = joint + own->latent * LANES;
    forward(&own->policy, step, vectors, joint, NULL);
    for (int i = 0; i < own->action; i++)
        for (int v = 0; v < vectors; v++) {
            long place = i * LANES + v * WIDTH;
            vec chosen = hyperbolic_tangent(load(action + place));
            store(action + place, chosen);
            store(to + place, clamp(chosen + load(noise + place), -1.0f, 1.0f));
        }
}

INLINE float *values(const network *q, int step)
{
    return at(q->layers[q->depth - 1].output, step, 1);
}

/* What comes after each decision: latents that the targets see, and TD targets. */
static void look_ahead(const learner *own, const learner_batch *batch, const float *noise,
                       int first, int count, int vectors)
{
    int size = own->size, observation = own->observation, action = own->action;
    for (int step = 0; step < own->horizon; step++) {
        const float *next = batch->next_observations + (long)step * size * observation;
        read_tile(own->observed, next, observation, first, count);
        forward(&own->target_encoder, 0, vectors, own->observed, at(own->goal, step, own->latent));
        forward(&own->encoder, 0, vectors, own->observed, own->imagined);
        read_tile(own->noise, noise + (long)step * size * action, action, first, count);
        act(own, 0, vectors, own->noise, own->imagined);
        for (int i = 0; i < own->members; i++)
            forward(own->target_q_ensemble + i, 0, vectors, own->imagined, NULL);
        for (int lane = 0; lane < count; lane++) {
            long place = (long)step * size + first + lane;
            float least = values(own->target_q_ensemble, 0)[lane];
            for (int i = 1; i < own->members; i++) {
                float value = values(own->target_q_ensemble + i, 0)[lane];
                if (value < least || value != value)
                    least = value;
            }
            float alive = 1.0f - batch->terminated[place];
            own->td_target[step * LANES + lane] =
                batch->rewards[place] + own->discount * alive * least;
        }
    }
}

/* Latents from the first observation on, rewards and values. */
static void roll_out(const learner *own, const learner_batch *batch, float *joint, int first,
                     int count, int vectors)
{
    int units = own->latent + own->action;
    read_tile(own->observed, batch->observation, own->observation, first, count);
    forward(&own->encoder, 0, vectors, own->observed, joint);
    for (int step = 0; step < own->horizon; step++) {
        float *now = at(joint, step, units);
        const float *actions = batch->actions + (long)step * own->size * own->action;
        read_tile(now + own->latent * LANES, actions, own->action, first, count);
        forward(&own->dynamics, step, vectors, now, at(joint, step + 1, units));
        forward(&own->reward, step, vectors, now, NULL);
        for (int i = 0; i < own->members; i++)
            forward(own->q_ensemble + i, step, vectors, now, NULL);
    }
}

/* One sequence's loss terms, added to `sums` with their weighted total; its priority; and in the
 * places of rewards and values, and for the latents, the slopes of the mean loss over H. */
static void sequence_loss(const learner *own, const learner_batch *batch, const float *joint,
                          int lane, int sequence, double *sums, float *priority)
{
    int latent = own->latent, units = latent + own->action;
    float terms[3] = {0.0f, 0.0f, 0.0f}, errors = 0.0f, rho = 1.0f;
    for (int step = 0; step < own->horizon; step++, rho *= own->rho) {
        long place = (long)step * own->size + sequence;
        const float *next = joint + (long)(step + 1) * units * LANES + lane;
        const float *goal = own->goal + (long)step * latent * LANES + lane;
        float weight = rho * batch->valid[place], squares = 0.0f;
        for (int i = 0; i < latent; i++) {
            float off = next[i * LANES] - goal[i * LANES];
            own->latent_slope[((long)(step + 1) * latent + i) * LANES + lane] = weight * off;
            squares += off * off;
        }
        float off = values(&own->reward, step)[lane] - batch->rewards[place];
        values(&own->reward, step)[lane] = weight * off;
        terms[0] += weight * (squares / (float)latent);
        terms[1] += weight * (off * off);
        for (int i = 0; i < own->members; i++) {
            float *value = values(own->q_ensemble + i, step) + lane;
            off = *value - own->td_target[step * LANES + lane];
            *value = weight * off;
            terms[2] += weight * (off * off);
            errors += weight * (off < 0.0f ? -off : off);
        }
    }
    float weights[] = {own->consistency_weight, own->reward_weight, own->value_weight};
    float share = batch->weights[sequence] / (float)own->size, total = 0.0f, rise[3];
    for (int i = 0; i < 3; i++) {
        rise[i] = 2.0f * weights[i] * share / (float)own->horizon;
        if (terms[i] > LARGEST_LOSS)
            rise[i] = 0.0f, terms[i] = LARGEST_LOSS;
        total += weights[i] * terms[i];
        sums[i] += terms[i];
    }
    sums[3] += total * batch->weights[sequence];
    *priority = errors > LARGEST_LOSS ? LARGEST_LOSS : errors;
    for (int step = 0; step < own->horizon; step++) {
        for (int i = 0; i < latent; i++)
            own->latent_slope[((long)(step + 1) * latent + i) * LANES + lane] *=
                rise[0] / (float)latent;
        values(&own->reward, step)[lane] *= rise[1];
        for (int i = 0; i < own->members; i++)
            values(own->q_ensemble + i, step)[lane] *= rise[2];
    }
}

static void learn_head(const learner *own, const network *head, float *joint, int vectors)
{
    for (int step = 0; step < own->horizon; step++) {
        float *slope = at(own->latent_slope, step, own->latent);
        backward(head, step, vectors);
        backward_to_inputs(head, step, vectors, 0, own->latent, slope);
    }
    sum_gradients(head, own->horizon, vectors, joint, own->latent + own->action, own->strip);
}

/* The lanes of no sequence have no slope. */
static void clear_lanes(const learner *own, const network *head, int count)
{
    for (int step = 0; step <= own->horizon; step++)
        for (int lane = count; lane < LANES; lane++)
            values(head, step)[lane] = 0.0f;
}

/* The gradients of encoder, dynamics, reward and Q, of the loss over H.
 *
 * noise       [H][B][A] on the policy's actions in the TD target
 * terms       [4], means over the batch: consistency, reward, value, and what is minimised
 * priorities  [B]
 */
void learner_model_loss(const learner *own, const learner_batch *batch, const float *noise,
                        float *terms, float *priorities)
{
    int units = own->latent + own->action;
    double sums[4] = {0.0, 0.0, 0.0, 0.0};
    prepare(&own->encoder);
    prepare(&own->dynamics);
    prepare(&own->reward);
    for (int i = 0; i < own->members; i++)
        prepare(own->q_ensemble + i);
    for (int first = 0; first < own->size; first += LANES) {
        int left = own->size - first, count = left < LANES ? left : LANES;
        int vectors = (count + WIDTH - 1) / WIDTH;
        float *joint = own->joint + (long)first * (own->horizon + 1) * units;
        look_ahead(own, batch, noise, first, count, vectors);
        roll_out(own, batch, joint, first, count, vectors);

        memset(own->latent_slope, 0,
               sizeof(float) * (size_t)((own->horizon + 1) * own->latent * LANES));
        for (int lane = 0; lane < count; lane++)
            sequence_loss(own, batch, joint, lane, first + lane, sums, priorities + first + lane);
        clear_lanes(own, &own->reward, count);
        learn_head(own, &own->reward, joint, vectors);
        for (int i = 0; i < own->members; i++) {
            clear_lanes(own, own->q_ensemble + i, count);
            learn_head(own, own->q_ensemble + i, joint, vectors);
        }
        for (int step = own->horizon - 1; step >= 0; step--) {
            float *slope = at(own->latent_slope, step, own->latent);
            backward(&own->dynamics, step, vectors);
            backward_to_inputs(&own->dynamics, step, vectors, 0, own->latent, slope);
        }
        sum_gradients(&own->dynamics, own->horizon, vectors, joint, units, own->strip);
        backward(&own->encoder, 0, vectors);
        sum_gradients(&own->encoder, 1, vectors, own->observed, own->observation, own->strip);
    }
    write_gradients(&own->encoder);
    write_gradients(&own->dynamics);
    write_gradients(&own->reward);
    for (int i = 0; i < own->members; i++)
        write_gradients(own->q_ensemble + i);
    for (int i = 0; i < 4; i++)
        terms[i] = (float)(sums[i] / own->size);
}

/* One sequence's part of the policy's loss at a step; the slopes of all members' values in their
 * places. As torch.minimum: members that are equal share the slope. */
static float least_value(const learner *own, int step, int lane, float weight)
{
    float least = 0.0f;
    for (int i = 0; i < own->members; i++) {
        float *place = values(own->q_ensemble + i, step) + lane, value = *place;
        int tie = i && value == least, new = !i || value < least || value != value;
        *place = new ? weight : tie ? 0.5f * weight : 0.0f;
        for (int earlier = 0; earlier < i && (new || tie); earlier++)
            values(own->q_ensemble + earlier, step)[lane] *= new ? 0.0f : 0.5f;
        if (new)
            least = value;
    }
    return weight * least;
}

/* The gradients of the policy, at the latents of the last call of learner_model_loss.
 *
 * noise  [H + 1][B][A] on the policy's actions
 * loss   [1]
 */
void learner_policy_loss(const learner *own, const learner_batch *batch, const float *noise,
                         float *loss)
{
    int units = own->latent + own->action, steps = own->horizon + 1;
    const layer *last = own->policy.layers + own->policy.depth - 1;
    double sum = 0.0;
    prepare(&own->policy);
    for (int i = 0; i < own->members; i++)
        prepare(own->q_ensemble + i);
    for (int first = 0; first < own->size; first += LANES) {
        int left = own->size - first, count = left < LANES ? left : LANES;
        int vectors = (count + WIDTH - 1) / WIDTH;
        float *joint = own->joint + (long)first * steps * units, rho = -1.0f / (float)own->size;
        for (int step = 0; step < steps; step++, rho *= own->rho) {
            float *now = at(joint, step, units), *drawn = at(own->noise, step, own->action);
            read_tile(drawn, noise + (long)step * own->size * own->action, own->action, first,
                      count);
            act(own, step, vectors, drawn, now);
            for (int i = 0; i < own->members; i++)
                forward(own->q_ensemble + i, step, vectors, now, NULL);
            for (int lane = 0; lane < count; lane++) {
                long before = (long)(step - 1) * own->size + first + lane;
                /* A latent belongs to its episode if the decision that led to it does. */
                float valid = step ? batch->valid[before] : 1.0f;
                sum += least_value(own, step, lane, rho * valid);
            }
        }
        memset(own->action_slope, 0, sizeof(float) * (size_t)(steps * own->action * LANES));
        for (int i = 0; i < own->members; i++) {
            const network *q = own->q_ensemble + i;
            clear_lanes(own, q, count);
            for (int step = 0; step < steps; step++) {
                float *slope = at(own->action_slope, step, own->action);
                backward(q, step, vectors);
                backward_to_inputs(q, step, vectors, own->latent, own->action, slope);
            }
        }
        for (int k = 0; k < steps * own->action * LANES; k++) {
            float action = last->output[k], moved = action + own->noise[k];
            float rise = moved >= -1.0f && moved <= 1.0f ? 1.0f - action * action : 0.0f;
            last->output[k] = own->action_slope[k] * rise;
        }
        for (int step = 0; step < steps; step++)
            backward(&own->policy, step, vectors);
        sum_gradients(&own->policy, steps, vectors, joint, units, own->strip);
    }
    write_gradients(&own->policy);
    *loss = (float)sum;
}

/* --- Adam, and the targets -------------------------------------------------------------------- */

/* Tensors of `size` elements, wherever they lie. */
typedef struct {
    float *weight;
    const float *gradient;
    float *mean, *square, *step; /* Adam's: exp_avg, exp_avg_sq, [1] */
    long size;
} learner_parameter;

INLINE void adam_some(const learner_parameter *own, long first, const size_t bytes, float rate,
                      float share1, float share2, float scale, float eps)
{
    vec weight = spread(0.0f), gradient = weight, mean = weight, square = weight;
    memcpy(&weight, own->weight + first, bytes);
    memcpy(&gradient, own->gradient + first, bytes);
    memcpy(&mean, own->mean + first, bytes);
    memcpy(&square, own->square + first, bytes);
    mean = multiply_add(gradient - mean, spread(share1), mean);
    square = multiply_add(gradient * gradient - square, spread(share2), square);
    weight = weight - rate * mean / multiply_add(root(square), spread(scale), spread(eps));
    memcpy(own->weight + first, &weight, bytes);
    memcpy(own->mean + first, &mean, bytes);
    memcpy(own->square + first, &square, bytes);
}

/* One step of Adam (Kingma and Ba 2015), as PyTorch makes it. */
void learner_adam(const learner_parameter *parameters, int count, double rate, double beta1,
                  double beta2, double eps)
{
    for (int i = 0; i < count; i++) {
        const learner_parameter *own = parameters + i;
        double left1 = 1.0, left2 = 1.0, power1 = beta1, power2 = beta2;
        *own->step += 1.0f;
        for (long bit = (long)*own->step; bit; bit >>= 1, power1 *= power1, power2 *= power2)
            if (bit & 1)
                left1 *= power1, left2 *= power2;
        vec scales = 1.0f / root(spread((float)(1.0 - left2)));
        float scale, now = (float)(rate / (1.0 - left1)), small = (float)eps;
        float share1 = (float)(1.0 - beta1), share2 = (float)(1.0 - beta2);
        memcpy(&scale, &scales, sizeof scale);
        long first = 0;
        for (; first + WIDTH <= own->size; first += WIDTH)
            adam_some(own, first, sizeof(vec), now, share1, share2, scale, small);
        if (first < own->size)
            adam_some(own, first, sizeof(float) * (size_t)(own->size - first), now, share1, share2,
                      scale, small);
    }
}

/* target <- target + rate * (weight - target). */
void learner_move_target(float *const *targets, const float *const *weights, const long *sizes,
                         int count, float rate)
{
    for (int i = 0; i < count; i++)
        for (long k = 0; k < sizes[i]; k++)
            targets[i][k] += rate * (weights[i][k] - targets[i][k]);
}
