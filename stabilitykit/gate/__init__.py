"""A gate for CI: does a model keep its limits in a dtype, on these prompts, and as well as it did before?"""
