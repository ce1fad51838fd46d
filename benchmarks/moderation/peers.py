"""Other filters on the same text, run in their own environments, because they need further libraries.

`python` is an interpreter with alt-profanity-check and hatesonar, `node` a folder with node_modules of obscenity,
allprofanity and @2toad/profanity. A peer that fails is reported with the last line of its error.
"""
import json
import subprocess
import sys
from pathlib import Path

PYTHON = {
    "alt-profanity-check": "import profanity_check as p\nout = [bool(x) for x in p.predict(texts)]",
    "hatesonar": "from hatesonar import Sonar\nsonar = Sonar()\n"
                 "out = [sonar.ping(text=t or ' ')['top_class'] != 'neither' for t in texts]",
}
NODE = {
    "obscenity": """const {RegExpMatcher, englishDataset, englishRecommendedTransformers} = await import('obscenity');
const m = new RegExpMatcher({...englishDataset.build(), ...englishRecommendedTransformers});
out = texts.map(t => m.hasMatch(t));""",
    "allprofanity": """const a = await import('allprofanity');
const filter = a.default.check ? a.default : a.default.default ?? new a.AllProfanity();
out = texts.map(t => filter.check(t));""",
    "@2toad/profanity": """const {Profanity} = await import('@2toad/profanity');
const filter = new Profanity(); out = texts.map(t => filter.exists(t));""",
}


def peer_answers(texts: list[str], python: Path | None, node: Path | None) -> dict[str, list[bool] | str]:
    """Whether each peer flags each text, or the line with which the peer failed, by its name."""
    data = json.dumps([text.encode("utf-8", "replace").decode() for text in texts])
    found: dict[str, list[bool] | str] = {}
    for name, code in PYTHON.items() if python else ():
        program = f"import json, sys\ntexts = json.load(sys.stdin)\n{code}\nprint('\\n' + json.dumps(out))"
        found[name] = _answer([str(python), "-W", "ignore", "-c", program], data, None)
    for name, code in NODE.items() if node else ():
        program = ("const {readFileSync} = await import('fs'); let out;"
                   "const texts = JSON.parse(readFileSync(0, 'utf8'));"
                   f"{code}; console.log('\\n' + JSON.stringify(out));")
        found[name] = _answer(["node", "--input-type=module", "-e", program], data, node)
    return found


def _answer(command: list[str], data: str, folder: Path | None) -> list[bool] | str:
    """The answer of one peer, or the last line of its error."""
    try:
        done = subprocess.run(command, input=data, capture_output=True, text=True, timeout=900, cwd=folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"
    if done.returncode:
        return "failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1][:160]
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    print(peer_answers(["a red star"], Path(sys.argv[1]), Path(sys.argv[2])))
