"""The attributes of a prompt, and whether the attribute classifier finds them in a picture."""

from __future__ import annotations

from minisd.evaluation.metrics import Share
from minisd.training.judge import Found, Verdict, tells_time
from minisd.training.scenes import Scene

ATTRIBUTES = {
    "object": "each named object is there",
    "background": "the plain colour, or the place",
    "time": "day, sunset or night, in places where it shows",
    "color": "the colour of a tinted object that is there",
    "second_color": "the colour of the second of two objects, where it is tinted and there",
    "left_right": "left or right, where both objects are there",
    "above": "above, where both objects are there",
    "next": "next to each other, where both objects are there",
    "count": "two or three of a kind",
    "nothing_else": "no object that the prompt does not name",
    "everything": "all of the above that the prompt names",
}
GOALS = {
    "object": 0.95,
    "background": 0.97,
    "time": 0.97,
    "color": 0.90,
    "left_right": 0.80,
    "count": 0.75,
}
MIN_DISTANCE = 16  # between the centres, in units of the frame, for one object to count as left of, or above, the other


def marks(scene: Scene, verdict: Verdict) -> dict[str, list[bool]]:
    """For every attribute that the scene's caption names, whether the verdict agrees: one value for each case."""
    seen: dict[str, list[Found]] = {}
    for found in verdict.things:
        seen.setdefault(found.noun, []).append(found)
    tints = {thing.noun: thing.color for thing in scene.things}
    given = {"object": [noun in seen for noun in tints], "background": [verdict.background == scene.background]}
    if tells_time(scene):
        given["time"] = [verdict.time == scene.time]
    colored = [(noun, color) for noun, color in tints.items() if color and noun in seen]
    if colored:
        given["color"] = [all(found.color == color for found in seen[noun]) for noun, color in colored]
    noun = scene.things[-1].noun
    if scene.relation and noun in dict(colored):
        given["second_color"] = [all(found.color == tints[noun] for found in seen[noun])]
    if scene.relation and all(given["object"]):
        first, second = (seen[thing.noun][0] for thing in scene.things)
        name = "left_right" if scene.relation in ("left", "right") else scene.relation
        given[name] = [related(first, second, scene.relation)]
    if scene.count > 1:
        given["count"] = [len(seen.get(scene.things[0].noun, [])) == scene.count]
    given["nothing_else"] = [set(seen) <= set(tints)]
    given["everything"] = [all(all(cases) for cases in given.values())]
    return given


def related(first: Found, second: Found, relation: str) -> bool:
    """Whether the first object is left of, right of, above or (on either side) next to the second."""
    right, down = first.x - second.x, first.y - second.y
    holds = {
        "left": right <= -MIN_DISTANCE,
        "right": right >= MIN_DISTANCE,
        "above": down <= -MIN_DISTANCE,
        "next": abs(right) >= MIN_DISTANCE,
    }
    return holds[relation]


def tally(scenes: list[Scene], verdicts: list[Verdict]) -> dict[str, Share]:
    """Count the correct cases of every attribute."""
    cases: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    for scene, verdict in zip(scenes, verdicts, strict=True):
        for name, results in marks(scene, verdict).items():
            cases[name] += results
    return {name: Share(sum(results), len(results)) for name, results in cases.items()}


def in_words(verdict: Verdict) -> str:
    """Describe a verdict in a few words."""
    things = [
        " ".join(filter(None, (found.color if found.color != "own" else "", found.noun)))
        for found in sorted(verdict.things, key=lambda found: found.x)
    ]
    return f"{', '.join(things) or 'nothing'} | {verdict.background}"
