"""TD-MPC (Hansen, Wang, Su 2022, arXiv 2203.04955): model, planner, replay and learner.

Knows nothing of pruning, files or command lines; what tracks its gradients attaches to
`Learner.gradient_hooks`.
"""
