"""What all clients are asked for: a schema and a tool that leave a random model few choices."""

MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["cat", "dog"]}, "is_tame": {"type": "boolean"}},
    "required": ["animal", "is_tame"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
TOOL = {
    "type": "function",
    "function": {"name": "feed", "description": "Feed a pet.", "parameters": SCHEMA},
}


def check_pet(pet):
    assert pet.keys() == {"animal", "is_tame"}
    assert pet["animal"] in ("cat", "dog")
    assert isinstance(pet["is_tame"], bool)
