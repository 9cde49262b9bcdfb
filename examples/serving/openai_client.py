"""Ask a served bank with OpenAI's client: stream an answer, upload files, search.

Usage: MSA_URL=http://127.0.0.1:8000 MSA_KEY=... python openai_client.py BANK [FILES...]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from openai import OpenAI

QUESTION = "What is this about?"


def main(bank: str, files: list[str]) -> None:
    """Upload the files, if any; then ask and search."""
    base = os.environ.get("MSA_URL", "http://127.0.0.1:8000")
    client = OpenAI(base_url=f"{base}/v1", api_key=os.environ.get("MSA_KEY", "none"))
    for name in files:
        done = client.vector_stores.files.upload_and_poll(
            vector_store_id=bank, file=Path(name), poll_interval_ms=500
        )
        why = done.last_error.message if done.last_error else ""
        print(f"{name}: {done.status} {why}")
    with client.responses.stream(model=f"msa/{bank}", input=QUESTION) as stream:
        for event in stream:
            if event.type == "response.file_search_call.searching":
                print("searching")
            elif event.type == "response.output_text.delta":
                print(event.delta, end="", flush=True)
        print()
        for item in stream.get_final_response().output:
            if item.type == "message":
                for mark in item.content[0].annotations:
                    print("  from", mark.filename)
    for hit in client.vector_stores.search(vector_store_id=bank, query=QUESTION):
        print(f"{hit.score:.2f}  {hit.filename}  {hit.content[0].text[:60]}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
