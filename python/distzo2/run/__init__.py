"""A run of `distzo2 finetune`: options, directory, loop."""
