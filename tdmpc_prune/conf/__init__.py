"""Hydra's own settings for each command. The commands' settings are in `tdmpc_prune.config`."""
