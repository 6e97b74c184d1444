"""TD-MPC's update and planner written the plain way, one latent step after the other.

Slow and obvious: what the fast versions in `tdmpc_prune.agent` are proved right against, and timed
against. It follows the description in Hansen et al. 2022 with no batching over the horizon, nothing
shared between iterations, and PyTorch's default optimiser loops.
"""

import torch
from torch import nn


def value_of(model, latent, actions, end_noise, discount):
    """Value `[N]` of the action sequences `[H, N, A]` from the latents `[N, D]`."""
    total, weight = 0, 1
    for action in actions:
        total = total + weight * model.predict_reward(latent, action)
        latent = model.next_latent(latent, action)
        weight *= discount
    end = model.act(latent, end_noise)
    return total + weight * torch.stack(model.q_values(latent, end)).min(0).values


@torch.no_grad()
def plan_one(model, observation, previous_mean, noise, config, discount, explore):
    """The decision for one environment: (action `[A]`, mean `[H, A]`)."""
    horizon = len(noise.samples[0])
    action_width = noise.exploration.shape[-1]
    clip = config.policy_noise_clip
    latent = model.encode(observation[None])

    mean = torch.zeros(horizon, action_width)
    for t in range(horizon):
        if t + 1 < len(previous_mean):
            mean[t] = previous_mean[t + 1]
    std = config.max_std * torch.ones(horizon, action_width)

    policy_latent = latent.repeat(config.policy_samples, 1)
    policy_actions = []
    for t in range(horizon):
        step_noise = (config.policy_noise * noise.policy[t, 0]).clamp(-clip, clip)
        policy_actions.append(model.act(policy_latent, step_noise))
        policy_latent = model.next_latent(policy_latent, policy_actions[-1])
    policy_actions = torch.stack(policy_actions)

    for i in range(config.iterations):
        samples = (mean[:, None] + std[:, None] * noise.samples[i, :, 0]).clamp(-1, 1)
        actions = torch.cat([samples, policy_actions], dim=1)
        ends = torch.cat([noise.sample_ends[i, 0], noise.policy_ends[0]])
        ends = (config.policy_noise * ends).clamp(-clip, clip)
        values = value_of(model, latent.repeat(actions.shape[1], 1), actions, ends, discount)
        elites = values.topk(config.elites).indices
        scores = torch.exp(config.temperature * (values[elites] - values[elites].max()))
        scores = scores / scores.sum()
        new_mean = (scores[None, :, None] * actions[:, elites]).sum(1)
        variance = (scores[None, :, None] * (actions[:, elites] - new_mean[:, None]) ** 2).sum(1)
        std = variance.sqrt().clamp(config.min_std, config.max_std)
        mean = config.momentum * mean + (1 - config.momentum) * new_mean

    chosen = min(int((scores.cumsum(0) < noise.choice[0]).sum()), config.elites - 1)
    action = actions[0, elites[chosen]]
    if explore:
        action = (action + std[0] * noise.exploration[0]).clamp(-1, 1)
    return action, mean


class PlainLearner:
    """One update at a time, one latent step at a time. Same arithmetic as `Learner`."""

    def __init__(self, model, target, planner, config):
        self.model, self.target, self.planner, self.config = model, target, planner, config
        policy = list(model.policy.parameters())
        rest = [p for name, p in model.named_parameters() if not name.startswith("policy")]
        self.model_optimiser = torch.optim.Adam(rest, lr=config.learning_rate)
        self.policy_optimiser = torch.optim.Adam(policy, lr=config.learning_rate)
        self.updates = 0

    def update(self, batch, noise):
        """`noise` `[2H + 1, B, A]` standard normal. Returns (losses by name, priorities `[B]`)."""
        model, config = self.model, self.config
        clip = self.planner.policy_noise_clip
        noise = (self.planner.policy_noise * noise).clamp(-clip, clip)
        horizon, size = batch.rewards.shape

        consistency = reward_loss = value_loss = priorities = torch.zeros(size)
        latent = model.encode(batch.observation)
        latents = [latent.detach()]
        for t in range(horizon):
            weight = config.rho**t * batch.valid[t]
            q_values = model.q_values(latent, batch.actions[t])
            reward = model.predict_reward(latent, batch.actions[t])
            latent = model.next_latent(latent, batch.actions[t])
            with torch.no_grad():
                goal = self.target.encode(batch.next_observations[t])
                next_latent = model.encode(batch.next_observations[t])
                next_action = model.act(next_latent, noise[t])
                next_value = torch.stack(self.target.q_values(next_latent, next_action)).min(0)[0]
                alive = 1 - batch.terminated[t]
                td_target = batch.rewards[t] + config.discount * alive * next_value
            latents.append(latent.detach())
            consistency = consistency + weight * ((latent - goal) ** 2).mean(-1)
            reward_loss = reward_loss + weight * (reward - batch.rewards[t]) ** 2
            for q in q_values:
                value_loss = value_loss + weight * (q - td_target) ** 2
                priorities = priorities + weight * (q - td_target).abs().detach()
        total = (
            config.consistency_weight * consistency.clamp(max=1e4)
            + config.reward_weight * reward_loss.clamp(max=1e4)
            + config.value_weight * value_loss.clamp(max=1e4)
        )
        loss = (total * batch.weights).mean()
        self.model_optimiser.zero_grad()
        (loss / horizon).backward()
        rest = self.model_optimiser.param_groups[0]["params"]
        nn.utils.clip_grad_norm_(rest, config.gradient_clip)
        self.model_optimiser.step()

        self.policy_optimiser.zero_grad()
        model.q_ensemble.requires_grad_(False)
        policy_loss = 0
        for t, latent in enumerate(latents):
            valid = batch.valid[t - 1] if t else torch.ones(size)
            action = model.act(latent, noise[horizon + t])
            value = torch.stack(model.q_values(latent, action)).min(0).values
            policy_loss = policy_loss - config.rho**t * (valid * value).mean()
        policy_loss.backward()
        model.q_ensemble.requires_grad_(True)
        policy = self.policy_optimiser.param_groups[0]["params"]
        nn.utils.clip_grad_norm_(policy, config.gradient_clip)
        self.policy_optimiser.step()

        self.updates += 1
        if self.updates % config.target_every == 0:
            with torch.no_grad():
                pairs = zip(self.target.parameters(), model.parameters(), strict=True)
                for slow, fast in pairs:
                    slow.add_(config.target_rate * (fast - slow))
        losses = {"model loss": loss.item(), "policy loss": policy_loss.item()}
        return losses, priorities.clamp(max=1e4)
