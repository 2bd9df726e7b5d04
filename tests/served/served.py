"""A directory read by vLLM: the log-probabilities of rows of tokens, as JSON on the last line of stdout.

python -m tests.served.served DIRECTORY ROWS.json
"""

import json
import os
import pathlib
import sys

# One process: what it cannot load, it raises here.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def main(directory, rows):
    from vllm import LLM, SamplingParams

    tokens = json.loads(pathlib.Path(rows).read_text())
    server = LLM(directory, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=len(tokens[0]) + 1,
                 max_num_seqs=2, gpu_memory_utilization=0.1, enforce_eager=True, seed=0)  # fmt: skip
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = server.generate([{"prompt_token_ids": row} for row in tokens], wanted, use_tqdm=False)
    print(json.dumps([[given[token].logprob for token, given in zip(row[1:], each.prompt_logprobs[1:], strict=True)]
                      for row, each in zip(tokens, found, strict=True)]))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
