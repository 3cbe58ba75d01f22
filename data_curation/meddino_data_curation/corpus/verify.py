"""`meddino-curate verify`: is every byte of a corpus still what was written, and every slice there once?"""

from pathlib import Path

from meddino.core.files import sha256_file
from meddino.data.corpus import Corpus
from meddino.data.manifests import corpus_hash
from meddino.data.shard_files import LocalShards
from meddino_data_curation.progress import progress


def verify(root: Path | str) -> list[str]:
    """Recompute every checksum of a corpus, and look for slices that are there twice.

    Args:
        root: The corpus, or its URL; of a URL every byte is fetched once and none is kept.

    Returns:
        What is wrong, one line each; empty if nothing is.

    Raises:
        ShardError: It is no corpus, or an unfinished one.
    """
    corpus = Corpus(root)
    problems = []
    for name, digest in corpus.info["manifests"].items():
        if _manifest_sha256(corpus, name) != digest:
            problems.append(f"{name}: checksum differs")
    hashes = {}
    shards = corpus.info["shards"]
    with progress("checking shards", len(shards)) as advance:
        for name, note in shards.items():
            hashes[name] = corpus.shards.sha256(name, int(note["bytes"]))
            if hashes[name] != note["sha256"]:
                problems.append(f"shards/{name}: checksum differs" if hashes[name] else f"shards/{name}: missing")
            advance()
    strange = [name for name in corpus.shards.names() if name not in shards]
    problems += [f"shards/{name}: is not in corpus.json" for name in strange]
    if not problems and corpus_hash(hashes) != corpus.content_hash:
        problems.append("corpus.json: content_hash differs from that of its shards")
    keys = corpus.slices.column("key").to_pylist()
    if repeated := len(keys) - len(set(keys)):
        problems.append(f"slices.parquet: {repeated} slices stand there more than once; build or merge the corpus again")
    damaged = {problem.split(":")[0].removeprefix("shards/") for problem in problems if problem.startswith("shards/")}
    for index in range(len(corpus)):
        if corpus.slices.column("shard")[index].as_py() in damaged & set(hashes):
            problems += _slice_problem(corpus, index)
    return problems


def _manifest_sha256(corpus: Corpus, name: str) -> str:
    if isinstance(corpus.shards, LocalShards):
        return sha256_file(corpus.root / name) if (corpus.root / name).is_file() else ""
    remote = corpus.shards.remote
    length = remote.size(name)
    return remote.sha256(name, length) if length is not None else ""


def _slice_problem(corpus: Corpus, index: int) -> list[str]:
    from meddino.core.errors import ShardError

    try:
        corpus.read(index)
    except ShardError as error:
        return [f"slice {corpus.key(index)}: {str(error).split(': ', 1)[-1]}"]
    return []
