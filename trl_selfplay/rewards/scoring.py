"""Temporary."""
class Scorer:
    def __init__(self, reward_funcs, reward_weights=None, reward_processing_classes=None, device=None, model_init_kwargs=None):
        self.funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        self.names = tuple(getattr(f, "__name__", "f") for f in self.funcs)
    def score(self, prompts, completions, completion_ids, columns, trainer_state=None):
        cols = [f(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns) for f in self.funcs]
        return list(zip(*cols))
    def weighted(self, rewards):
        v = [r for r in rewards if r is not None]
        return sum(v) if v else None
