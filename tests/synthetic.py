"""Environments with known optima, as Gymnasium ids `tests.synthetic:<name>`."""

import gymnasium
import numpy as np


class Reach(gymnasium.Env):
    """A point on a line that starts at ±1 and moves by 0.25·action; each step pays 1 − x²."""

    observation_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-3.0, 3.0, (1,), np.float32)  # rescaled by make_env
    speed = 0.25

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = float(self.np_random.choice([-1.0, 1.0]))
        return self._observe(), {}

    def step(self, action):
        self.x = float(np.clip(self.x + self.speed * action[0] / 3, -2, 2))
        return self._observe(), 1 - self.x**2, False, False, {}

    def _observe(self):
        return np.array([self.x], np.float32)


REACH_STEPS = 20
# At full speed: 0.75, 0.5, 0.25, 0, and then there.
REACH_OPTIMUM = sum(1 - x**2 for x in (0.75, 0.5, 0.25)) + (REACH_STEPS - 3)


class Ledge(Reach):
    """Pays 1 + x a step, but ends for good where x exceeds 1: greed for x loses what follows."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = float(self.np_random.uniform(-0.5, 0.5))
        return self._observe(), {}

    def step(self, action):
        self.x = max(self.x + self.speed * action[0] / 3, -2.0)
        return self._observe(), 1 + self.x, self.x > 1, False, {}


class OneStep(Reach):
    """Terminates after its first step."""

    def step(self, action):
        observation, reward, *_ = super().step(action)
        return observation, reward, True, False, {}


class Dictionary(Reach):
    observation_space = gymnasium.spaces.Dict({"x": Reach.observation_space})


class Exploding(Reach):
    """Its reward is not a number after a while."""

    def step(self, action):
        observation, reward, *rest = super().step(action)
        self.taken = getattr(self, "taken", 0) + 1
        return observation, np.nan if self.taken > 40 else reward, *rest


class InPlace(Reach):
    """Changes the very array that it has returned."""

    def reset(self, **given):
        observation, info = super().reset(**given)
        self.kept = observation
        return self.kept, info

    def step(self, action):
        action *= 0.5
        self.kept *= 0.9
        return self.kept, 0.0, False, False, {}


class Rare(Reach):
    """Raises in the ninth step of one episode in five."""

    def reset(self, **given):
        returned = super().reset(**given)
        self.left = 8 if self.np_random.random() < 0.2 else np.inf
        return returned

    def step(self, action):
        self.left -= 1
        if self.left < 0:
            raise ValueError("the solver did not converge")
        return super().step(action)


class Unrepeatable(Reach):
    """Starts where no seed says."""

    starts = 0

    def reset(self, **given):
        super().reset(**given)
        Unrepeatable.starts += 1
        self.x = 0.5 / Unrepeatable.starts
        return self._observe(), {}


class Plain(Reach):
    """Knows nothing of drawing."""

    def __init__(self):
        pass


class Drawn(Reach):
    """Draws itself, and says how fast it is to be shown."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012

    def render(self):
        return np.full((32, 48, 3), int(100 + 50 * self.x), np.uint8)


class Steady(Reach):
    """Pays 1 a step, whatever is done."""

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, 1.0, *rest


class Chancy(Reach):
    """Pays nothing in one episode and 1 a step in the next, as the seed says."""

    def reset(self, *, seed=None, options=None):
        self.pays = float((seed or 0) % 2)
        return super().reset(seed=seed, options=options)

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, self.pays, *rest


for name, environment in list(globals().items()):
    if isinstance(environment, type) and issubclass(environment, Reach):
        gymnasium.register(f"{name}-v0", environment, max_episode_steps=REACH_STEPS)
