"""Command lines to start from: shown at the end of each command's help and in docs/cli.md. A test parses them all."""

#: By command: what a line is for, and the line.
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "collect": (
        ("from a model that ships with nsae, offline", "nsae collect --model mini"),
        ("two layers of GPT-2 from your own text", "nsae collect --corpus texts/ --layers 3,6 --tokens 10M"),
    ),
    "norms": (("of the newest store", "nsae norms"),),
    "alter": (("a control in which norms go with other directions", "nsae alter --permute-norms --name shuffled"),),
    "train": (
        ("one SAE on the newest store", "nsae train --act tanh-relu --l2-norm sq"),
        (
            "a grid of 18 at matched L0, in one pass",
            "nsae train --l2-norm none,norm,sq --target-l0 8,16 --seed 0,1,2",
        ),
        ("without a store", "nsae train --from-model gpt2 --tokens 100M --log-to tensorboard"),
    ),
    "analyze-top-norms": (("of all SAEs of a group", "nsae analyze-top-norms grid --top 1%"),),
    "eval": (("on held-out text, per norm bin too", "nsae eval grid --bins"),),
    "audit": (
        ("an SAE on the Hugging Face hub", "nsae audit org/repo:folder"),
        ("one in a folder, with its model in another", "nsae audit ./sae --model ./gpt2 --tokens 200k"),
    ),
    "compare": (("every method with the plain one", "nsae compare grid --baseline 'relu p=0'"),),
    "plot": (
        ("L0 against the errors of a grid", "nsae plot pareto grid --format png,svg"),
        ("the activations and their derivatives", "nsae plot activation"),
    ),
    "report": (("of the whole workspace", "nsae report"),),
    "run": (("the demo, from a clone of the repository", "nsae run experiments/001-quickstart/config.yaml"),),
    "list": (("in another workspace", "nsae --workspace ~/runs list"),),
    "verify": (
        ("everything", "nsae verify"),
        ("one store, and drop what is damaged", "nsae verify acts --repair"),
    ),
    "bench": (
        ("the step of your SAE", "nsae bench --d-in 768 --d-sae 24576 --l0 64"),
        ("when train should go over to sparse steps here", "nsae bench --calibrate"),
    ),
    "doctor": (("for a bug report", "nsae doctor"),),
    "completion": (
        ("for this shell", 'eval "$(nsae completion bash)"'),
        ("for every new one", "nsae completion bash >> ~/.bashrc"),
        ("zsh, below compinit", "nsae completion zsh >> ~/.zshrc"),
        ("fish", "nsae completion fish > ~/.config/fish/completions/nsae.fish"),
    ),
}


def epilog(command: str) -> str | None:
    """The examples as the end of a command's help."""
    examples = EXAMPLES.get(command)
    if examples is None:
        return None
    lines = [f"  # {purpose}\n  {line}" for purpose, line in examples]
    return "\b\nExamples:\n" + "\n".join(lines)
