"""Trajectories: rollouts of several turns, in which the policy calls tools and reads their results."""
