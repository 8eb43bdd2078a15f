"""Durable sagas on one machine: workflows of stages, each run by a pool of worker processes."""
