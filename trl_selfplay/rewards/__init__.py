from trl_selfplay.rewards.answer import exact_reward, extract_answer
