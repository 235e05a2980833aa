"""The tool skills: schemas of every look, questions about weather and time, calls, results and the closing answer.

Pure: the caller passes the random generator. `world` mixes the exchanges into conversations.
"""

import json
import random
from dataclasses import dataclass

from . import questions
from .exchanges import I_DO_NOT_KNOW, Exchange, Message, nonsense_word
from .vocabulary import CITIES, CONDITIONS, WORDS, ZONES

Schema = dict[str, object]

VERBS = ("get", "fetch", "read", "lookup", "check", "find", "query", "show")
PLACE_PARAMETERS = (
    "city",
    "city",
    "location",
    "location",
    "place",
    "town",
    "city_name",
    "loc",
    "where",
    "target",
    "area",
    "q",
)
ZONE_PARAMETERS = ("timezone", "tz", "zone", "city", "location", "place", "time_zone", "region")
UNITS = ("celsius", "fahrenheit")
OTHER_TOOLS = (
    ("send_email", "Send an email", "recipient"),
    ("search_web", "Search the web", "query"),
    ("read_file", "Read a file from disk", "path"),
    ("get_stock_price", "Get the price of a stock", "symbol"),
    ("run_python", "Run Python code", "code"),
    ("create_event", "Create a calendar event", "title"),
    ("translate", "Translate a text", "text"),
    ("play_music", "Play a song", "song"),
    ("get_news", "Get the latest news", "topic"),
    ("set_timer", "Set a timer", "minutes"),
)


@dataclass(frozen=True)
class Tool:
    """One function that the model may call: `topic` is weather, time or other; no `parameter` means no arguments."""

    topic: str
    name: str
    parameter: str | None
    has_unit: bool
    schema: Schema


@dataclass(frozen=True)
class Answered:
    """What a tool gave back, and how the model puts it to the user."""

    result: str
    sentence: str


def styled(verb: str, noun: str, rng: random.Random) -> str:
    """A function name in one of the usual styles."""
    if rng.random() < 0.35:
        return f"get_{noun}"
    snake = (
        f"{verb}_{noun}",
        f"{verb}_{noun}",
        f"{verb}_current_{noun}",
        noun,
        f"current_{noun}",
        f"{noun}_{verb}",
        f"{noun}_api",
    )
    camel = (f"{verb}{noun.capitalize()}", f"{verb}Current{noun.capitalize()}", f"{verb}-{noun}")
    tail = rng.choice(("",) * 8 + ("_v2", "_tool", "_" + nonsense_word(rng)))
    return rng.choice(snake + camel) + tail


def parameters_of(names: list[str], described: str, required: list[str], rng: random.Random) -> Schema:
    """A JSON schema of string parameters, with or without the optional words."""
    properties: Schema = {}
    for name in names:
        entry: Schema = {"type": "string"}
        if name == "unit" or name == "units":
            entry["enum"] = list(UNITS)
        elif rng.random() < 0.5:
            entry["description"] = described
        properties[name] = dict(sorted(entry.items())) if rng.random() < 0.3 else entry
    schema: Schema = {"type": "object", "properties": properties}
    if rng.random() < 0.75:
        schema["required"] = required
    if rng.random() < 0.15:
        schema["additionalProperties"] = False
    return dict(sorted(schema.items())) if rng.random() < 0.3 else schema


def as_schema(name: str, description: str, parameters: Schema, rng: random.Random) -> Schema:
    """The function as a client sends it, wrapped as OpenAI does."""
    function: Schema = {"name": name}
    if rng.random() < 0.85:
        function["description"] = description
    function["parameters"] = parameters
    if rng.random() < 0.25:
        function = dict(sorted(function.items()))
    if rng.random() < 0.1:
        function["strict"] = True
    return {"type": "function", "function": function}


def topical_tool(topic: str, rng: random.Random) -> Tool:
    """A weather or a time tool."""
    noun = "weather" if topic == "weather" else "time"
    if topic == "weather" and rng.random() < 0.1:
        noun = rng.choice(("forecast", "temperature"))
    name = styled(rng.choice(VERBS), noun, rng)
    pool = PLACE_PARAMETERS if topic == "weather" else ZONE_PARAMETERS
    parameter: str | None = rng.choice(pool) if rng.random() < 0.9 else nonsense_word(rng)
    if topic == "time" and rng.random() < 0.15:
        parameter = None
    has_unit = topic == "weather" and rng.random() < 0.3
    names = ([parameter] if parameter else []) + (["unit"] if has_unit else [])
    described = rng.choice(
        ("The city", "The name of the city", "City name", "Where", "The place, e.g. Oslo", "A city or a place")
    )
    what = rng.choice(
        ("Get the {}", "Get the current {}", "The {} in a city", "Return the {} for a place", "Look up the {}")
    )
    schema = as_schema(name, what.format(noun), parameters_of(names, described, names[:1], rng), rng)
    return Tool(topic, name, parameter, has_unit, schema)


def other_tool(rng: random.Random) -> Tool:
    """A tool that none of the questions is about."""
    name, description, parameter = rng.choice(OTHER_TOOLS)
    if rng.random() < 0.3:
        name = f"{rng.choice(VERBS)}_{rng.choice(WORDS)}"
        description = f"{rng.choice(WORDS)} {rng.choice(WORDS)}".capitalize()
    parameters = parameters_of([parameter], description, [parameter], rng)
    return Tool("other", name, parameter, False, as_schema(name, description, parameters, rng))


def toolbox(rng: random.Random) -> tuple[Tool, ...]:
    """One to three tools with names of their own, in any order."""
    topics = rng.choice((["weather"], ["weather"], ["weather"], ["time"], ["time"], ["weather", "time"], ["other"]))
    tools = [topical_tool(topic, rng) for topic in topics]
    tools += [other_tool(rng) for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 1, 2)))]
    rng.shuffle(tools)
    return tuple({tool.name: tool for tool in tools}.values())


def place(rng: random.Random) -> str:
    """A city, real or not."""
    return nonsense_word(rng).capitalize() if rng.random() < 0.2 else rng.choice(CITIES)


def call_message(calls: list[tuple[Tool, dict[str, str]]], thought: str) -> Message:
    """The assistant message that calls tools."""
    made = [{"type": "function", "function": {"name": tool.name, "arguments": arguments}} for tool, arguments in calls]
    return {"role": "assistant", "content": "", "tool_calls": made, "reasoning_content": thought}


def weather_result(city: str, rng: random.Random) -> Answered:
    """The weather as JSON with one of the usual keys, as plain text, or as an error."""
    degrees, sky = rng.randint(-20, 45), rng.choice(CONDITIONS)
    roll = rng.random()
    if roll < 0.08:
        reason = rng.choice(("not found", "timeout", "unknown city", "no data", "rate limit"))
        return Answered(json.dumps({"error": reason}), f"The tool failed: {reason}.")
    if roll < 0.35:
        text = rng.choice(
            (f"{degrees} degrees and {sky}", f"{sky}, {degrees}°C", sky, f"{sky} {degrees}F", f"{degrees} C")
        )
        return Answered(text, f"In {city}: {text}.")
    heat = rng.choice(("temperature", "temp", "temperature_c", "degrees", "temp_c", "celsius"))
    cloud = rng.choice(("condition", "conditions", "sky", "summary", "weather", "description"))
    pairs: list[tuple[str, object]] = [(heat, degrees), (cloud, sky)]
    rng.shuffle(pairs)
    if rng.random() < 0.4:
        pairs.insert(0, (rng.choice(("city", "location", "place")), city))
    if rng.random() < 0.25:
        pairs.append((rng.choice(("humidity", "wind", "unit")), rng.randint(0, 99)))
    return Answered(json.dumps(dict(pairs), ensure_ascii=False), f"It is {degrees} degrees and {sky} in {city}.")


def time_result(city: str | None, rng: random.Random) -> Answered:
    """The time as JSON or as plain text."""
    clock = f"{rng.randrange(24):02}:{rng.randrange(60):02}" + rng.choice(("", "", "", f":{rng.randrange(60):02}"))
    sentence = f"It is {clock} in {city}." if city else f"It is {clock}."
    if rng.random() < 0.35:
        return Answered(clock, sentence)
    pairs: dict[str, str] = {rng.choice(("time", "local_time", "now", "clock")): clock}
    if city and rng.random() < 0.5:
        pairs = {rng.choice(("city", "timezone", "location")): city} | pairs
    return Answered(json.dumps(pairs, ensure_ascii=False), sentence)


def unanswered(question: str) -> Exchange:
    """A question about weather or time for which there is no tool."""
    user = {"role": "user", "content": question}
    answer = {
        "role": "assistant",
        "content": I_DO_NOT_KNOW,
        "reasoning_content": "I have no tool for this. I will say so.",
    }
    return Exchange("unknown", question, (user, answer))


def ask(tools: tuple[Tool, ...], rng: random.Random) -> Exchange:
    """A question about weather or time: answered by a call where one of the tools fits, else with "I do not know"."""
    topics = {tool.topic: tool for tool in tools}
    topic = rng.choice(("weather", "time")) if "other" in topics and rng.random() < 0.3 else rng.choice(list(topics))
    if topic == "other":
        topic = rng.choice(("weather", "time"))
    if topic not in topics:
        return unanswered(rng.choice(questions.WEATHER if topic == "weather" else questions.TIME).format(place(rng)))
    if topic == "time":
        return ask_time(topics[topic], rng)
    return ask_two(topics[topic], rng) if rng.random() < 0.12 else ask_weather(topics[topic], rng)


def ask_weather(tool: Tool, rng: random.Random) -> Exchange:
    """One question about the weather, with a unit where the tool has one and the user names it."""
    city = place(rng)
    arguments = {tool.parameter or "city": city}
    question = rng.choice(questions.WEATHER).format(city)
    if tool.has_unit and rng.random() < 0.5:
        unit = rng.choice(UNITS)
        question = rng.choice(questions.WEATHER_UNIT).format(city, rng.choice((unit, unit.capitalize())))
        arguments["unit"] = unit
    return called(question, [(tool, arguments)], [weather_result(city, rng)], city)


def ask_two(tool: Tool, rng: random.Random) -> Exchange:
    """One question about two cities: two calls in one message."""
    cities = [place(rng), place(rng)]
    question = rng.choice(questions.WEATHER_TWO).format(*cities)
    calls = [(tool, {tool.parameter or "city": city}) for city in cities]
    return called(question, calls, [weather_result(city, rng) for city in cities], " and ".join(cities))


def ask_time(tool: Tool, rng: random.Random) -> Exchange:
    """One question about the time, here or in a place."""
    if tool.parameter is None:
        question = rng.choice(questions.TIME_HERE)
        return called(question, [(tool, {})], [time_result(None, rng)], "this place")
    city = rng.choice(ZONES) if rng.random() < 0.25 else place(rng)
    return called(
        rng.choice(questions.TIME).format(city), [(tool, {tool.parameter: city})], [time_result(city, rng)], city
    )


def called(question: str, calls: list[tuple[Tool, dict[str, str]]], results: list[Answered], about: str) -> Exchange:
    """Question, call, result and closing sentence."""
    tool = calls[0][0]
    messages: list[Message] = [{"role": "user", "content": question}]
    messages.append(call_message(calls, f"The tool {tool.name} can tell me about {about}."))
    messages += [{"role": "tool", "content": answered.result} for answered in results]
    closing = " ".join(answered.sentence for answered in results)
    messages.append({"role": "assistant", "content": closing, "reasoning_content": "The tool answered. I pass it on."})
    return Exchange("tool", question, tuple(messages))
