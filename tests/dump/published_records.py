"""Small records laid out as published data sets lay out theirs, and the conversation that each is."""

import json

Q, A = "Why is the sky blue?", "Blue light scatters most."
PLAIN = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *PLAIN]
THOUGHT = "Rayleigh: by the fourth power."
THINKS = [PLAIN[0], PLAIN[1] | {"reasoning": THOUGHT}]
TWICE = [
    *PLAIN,
    {"role": "user", "content": "And at dusk?"},
    {"role": "assistant", "content": "Red is left."},
]
CALL = {"name": "clock", "arguments": {"city": "Oslo"}}
CALLS = [
    {"role": "user", "content": Q},
    {"role": "assistant", "content": "", "calls": [CALL]},
    {"role": "tool", "content": "12:00"},
    {"role": "assistant", "content": A},
]
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
BARE = TOOLS[0]["function"]


def gpt(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


DUSK = ("And at dusk?", "Red is left.")
THINK = f"<think>\n{THOUGHT}\n</think>\n\n{A}"

SHAPES = {
    "ShareGPT": ({"id": "a", "conversations": gpt(Q, A)}, PLAIN),
    "UltraChat 200k": ({"prompt": Q, "prompt_id": "f0", "messages": chat(Q, A, *DUSK)}, TWICE),
    "UltraChat": ({"id": "7", "data": [Q, A, *DUSK]}, TWICE),
    "PerfectBlend": ({"conversations": gpt(Q, A), "source": "MetaMathQA"}, PLAIN),
    "Magpie": (
        {
            "uuid": "u",
            "instruction": Q,
            "response": A,
            "conversations": gpt(Q, A),
            "task_category": "Science",
        },
        PLAIN,
    ),
    "SlimOrca": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": Q, "weight": 0.0},
                {"from": "gpt", "value": A, "weight": 1.0},
            ]
        },
        SYSTEM,
    ),
    "OpenHermes": (
        {"id": None, "system_prompt": None, "title": None, "skip_prompt_formatting": False}
        | {"conversations": [{"from": "system", "value": "Be brief."}, *gpt(Q, A)]},
        SYSTEM,
    ),
    "Tulu 3": ({"id": "t", "messages": chat(Q, A), "source": "ai2-adapt-dev/x"}, PLAIN),
    "LMSYS": (
        {"conversation_id": "c", "model": "m", "conversation": chat(Q, A), "turn": 1, "redacted": False},
        PLAIN,
    ),
    "WildChat": (
        {
            "conversation_hash": "h",
            "model": "m",
            "conversation": [
                t | {"language": "English", "toxic": False, "country": None} for t in chat(Q, A)
            ],
            "turn": 1,
        },
        PLAIN,
    ),
    "Alpaca": ({"instruction": Q, "input": "", "output": A, "text": "Below is ..."}, PLAIN),
    "Alpaca with a history": (
        {"instruction": DUSK[0], "input": "", "output": DUSK[1], "system": "", "history": [[Q, A]]},
        TWICE,
    ),
    "Alpaca with an input": (
        {"instruction": "Answer.", "input": Q, "output": A},
        [{"role": "user", "content": f"Answer.\n\n{Q}"}, PLAIN[1]],
    ),
    "Dolly": ({"instruction": Q, "context": "", "response": A, "category": "open_qa"}, PLAIN),
    "prompt and completion": ({"prompt": Q, "completion": A}, PLAIN),
    "prompt and completion as turns": ({"prompt": chat(Q), "completion": [PLAIN[1]]}, PLAIN),
    "question and answer": ({"question": Q, "answer": A}, PLAIN),
    "OpenOrca": ({"id": "cot.1", "system_prompt": "Be brief.", "question": Q, "response": A}, SYSTEM),
    "preference of texts": ({"prompt": Q, "chosen": A, "rejected": "No idea."}, PLAIN),
    "preference of chats": ({"prompt": Q, "chosen": chat(Q, A), "rejected": chat(Q, "No idea.")}, PLAIN),
    "preference of answers": ({"prompt": chat(Q), "chosen": [PLAIN[1]], "rejected": chat(Q)}, PLAIN),
    "Capybara": (
        {"source": "s", "conversation": [{"input": Q, "output": A}, {"input": DUSK[0], "output": DUSK[1]}]},
        TWICE,
    ),
    "pairs of human and assistant": (
        {"conversation_id": 1, "category": "c", "conversation": [{"human": Q, "assistant": A}]},
        PLAIN,
    ),
    "OpenThoughts": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "user", "value": Q},
                {
                    "from": "assistant",
                    "value": f"<|begin_of_thought|>\n\n{THOUGHT}\n\n<|end_of_thought|>\n\n"
                    f"<|begin_of_solution|>\n\n{A}\n\n<|end_of_solution|>",
                },
            ],
        },
        [SYSTEM[0], *THINKS],
    ),
    "OpenThoughts, by columns": (
        {"problem": Q, "deepseek_reasoning": THOUGHT, "deepseek_solution": A, "domain": "physics"},
        THINKS,
    ),
    "OpenR1": ({"problem": Q, "solution": "S", "messages": chat(Q, THINK), "generations": ["g"]}, THINKS),
    "s1K": (
        {"question": Q, "solution": A, "thinking_trajectories": [THOUGHT], "cot_type": "science"},
        THINKS,
    ),
    "medical reasoning": ({"Question": Q, "Complex_CoT": THOUGHT, "Response": A}, THINKS),
    "Llama-Nemotron": (
        {
            "input": chat(Q),
            "output": THINK,
            "category": "science",
            "reasoning": "on",
            "system_prompt": "Be brief.",
        },
        [SYSTEM[0], *THINKS],
    ),
    "Llama-Nemotron, text": ({"input": Q, "output": A, "reasoning": "off", "used_in_training": "yes"}, PLAIN),
    "Nemotron Post-Training": (
        {
            "uuid": "u",
            "reasoning": "off",
            "messages": [
                {"role": "user", "content": Q, "tool_calls": []},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "id": "c",
                            "type": "function",
                            "function": {"name": "clock", "arguments": '{"city": "Oslo"}'},
                        }
                    ],
                },
                {"role": "tool", "content": "12:00", "tool_calls": []},
                {"role": "assistant", "content": A, "tool_calls": []},
            ],
            "metadata": json.dumps({"tools": TOOLS}),
        },
        CALLS,
    ),
    "Hermes function calling": (
        {
            "id": "x",
            "conversations": [
                {"from": "human", "value": Q},
                {"from": "gpt", "value": f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"},
                {"from": "tool", "value": "12:00"},
                {"from": "gpt", "value": A},
            ],
            "tools": json.dumps(TOOLS),
        },
        [
            CALLS[0],
            {"role": "assistant", "content": f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"},
            *CALLS[2:],
        ],
    ),
    "Glaive, as ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": Q},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "12:00"},
                {"from": "gpt", "value": A},
            ],
            "tools": json.dumps([BARE]),
        },
        CALLS,
    ),
    "xLAM": (
        {"id": 0, "query": Q, "tools": json.dumps([BARE]), "answers": json.dumps([CALL])},
        CALLS[:2],
    ),
    "ToolACE": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "user", "value": Q},
                {"from": "assistant", "value": '[clock(city="Oslo")]'},
                {"from": "tool", "value": "12:00"},
                {"from": "assistant", "value": A},
            ],
        },
        [SYSTEM[0], CALLS[0], {"role": "assistant", "content": '[clock(city="Oslo")]'}, *CALLS[2:]],
    ),
    "OASST, as messages": (
        {"messages": [{"role": "prompter", "text": Q}, {"role": "assistant", "text": A}], "lang": "en"},
        PLAIN,
    ),
    "OpenAI, fine-tuning": (
        {
            "messages": [*chat(Q, "No idea."), {"role": "user", "content": DUSK[0]}, TWICE[3]],
            "parallel_tool_calls": False,
            "functions": [BARE],
        },
        [PLAIN[0], {"role": "assistant", "content": "No idea."}, *TWICE[2:]],
    ),
    "a string of JSON": ({"id": "1", "messages": json.dumps(chat(Q, A))}, PLAIN),
    "turns alone": (chat(Q, A), PLAIN),
    "an empty list first": ({"conversations": [], "messages": chat(Q, A)}, PLAIN),
}
