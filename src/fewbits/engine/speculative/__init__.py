"""Speculative decoding: a proposer drafts tokens, the target verifies them in one pass, the driver decides how many.

driver.draft(running)      lengths: how many tokens are worth drafting now; the proposer drafts them
runner.step(…)             verifies: every draft token that is what would have been chosen is kept
driver.watch(…)            lengths learn from what was accepted and how long it took; the proposer takes the states
"""
