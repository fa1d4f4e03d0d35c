"""From prompts to text: requests, scheduling, sampling, tokenizing. `llm.LLM` is the way in."""
