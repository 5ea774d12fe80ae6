"""Temporary."""
def print_round_table(lines):
    import json; print(json.dumps(lines[-1]))
def rounds_markdown(lines): return "rounds"
class SamplingProgress:
    def __init__(self,total,description,disable=False): pass
    def __enter__(self): return self
    def __exit__(self,*a): pass
    def update(self,n,t): pass
    def set_solved(self,s): pass
