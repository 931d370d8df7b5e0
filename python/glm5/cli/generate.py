"""Continue a text with a model: of a run, from its newest checkpoint, or of a Hugging Face directory."""

import math
import sys
from pathlib import Path

NAME = "generate"


def add_arguments(parser) -> None:
    """The prompt, the model, and how to sample."""
    parser.add_argument("text", nargs="?", metavar="PROMPT", help="text to continue (default: 'def ')")
    parser.add_argument("--prompt", help="the same as an option")
    parser.add_argument(
        "--run", dest="folder", type=Path, default=Path("runs/tiny"), help="run folder (default: %(default)s)"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face model directory, in place of a run")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of a directory's weights (default: as stored)")
    parser.add_argument("--fp8", choices=("dequantize", "keep"), default="dequantize", help="what becomes of FP8 weights")
    parser.add_argument("--tokens", type=int, default=400, help="how many tokens to write at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")


def run(args) -> None:
    """Writes the prompt, and then its continuation, token by token, to standard output."""
    import torch

    from glm5.data import Tokenizer
    from glm5.data.text import TextStream

    if args.text is not None and args.prompt is not None:
        raise ValueError("the prompt was given twice, as an argument and as --prompt")
    if args.tokens < 0:
        raise ValueError(f"--tokens is {args.tokens}, want >= 0")
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature is {args.temperature}, want a finite number >= 0")
    prompt = next((text for text in (args.text, args.prompt) if text is not None), "def ")
    model, tokenizer = _of_directory(args) if args.model else _of_run(args)
    eos = model.config.eos_token_id
    start, stop = (), () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    if isinstance(tokenizer, Tokenizer):  # trained on documents, as they begin and end in its corpus
        start, stop = tokenizer.encode_document("")[:-1], (*stop, tokenizer.eos_id)
    ids = torch.tensor([*start, *tokenizer.encode(prompt)], dtype=torch.int64)
    room = model.config.max_position_embeddings - ids.shape[0]
    if ids.shape[0] == 0 or room < 0:
        raise ValueError(f"the prompt has {ids.shape[0]} tokens, want 1 to {room + ids.shape[0]}")

    left = tokens_wanted = min(args.tokens, room)
    text = TextStream(tokenizer, ids.tolist())

    def show(position: int, tokens: torch.Tensor) -> None:
        nonlocal left
        left -= 1
        token = int(tokens[0])
        if token not in stop:
            print(text.push(token, last=left == 0), end="", flush=True)

    print(prompt, end="", flush=True)
    options = dict(temperature=args.temperature, seed=args.seed, stop_tokens=stop, stream=show)
    model.generate(ids, tokens_wanted, **options)
    print()


def _of_directory(args):
    import torch

    from glm5.cli.progress import Bar
    from glm5.data.text import load_tokenizer
    from glm5.model import Glm5ForCausalLM

    tokenizer = load_tokenizer(args.model)
    with Bar(f"loading {args.model}") as bar:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        model = Glm5ForCausalLM.from_pretrained(args.model, dtype=dtype, fp8=args.fp8, progress=bar)
    return model, tokenizer


def _of_run(args):
    from glm5.data import ByteTokenizer
    from glm5.train.run import load_run

    return load_run(args.folder, lambda message: print(message, file=sys.stderr)), ByteTokenizer()
