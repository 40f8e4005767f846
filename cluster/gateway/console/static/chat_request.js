/** The request of a chat: made of the settings, and shown as code for other clients. Pure functions. */

/** A setting that cannot be sent. `field`: its name in the form. */
export class SettingError extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

const KEY = "HEADRACE_API_KEY";
const STREAM_LOOP = `for chunk in answer:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
`;

/**
 * Return the body of a request. Empty settings are left out, so that the model's defaults hold. Raises SettingError.
 * @param {Record<string, string>} settings texts of the form
 * @param {any[]} messages
 */
export function bodyOf(settings, messages) {
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  const body = { model: settings.model, messages: [...system, ...messages] };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (!settings[name].trim()) continue;
    const value = Number(settings[name]);
    if (!Number.isFinite(value)) throw new SettingError(name, `${name}: enter a number, or leave it empty.`);
    body[name] = value;
  }
  const stop = settings.stop.split("\n").filter((line) => line !== "");
  if (stop.length) body.stop = stop;
  if (settings.reasoning_effort) body.reasoning_effort = settings.reasoning_effort;
  if (settings.tools.trim()) {
    body.tools = toolsOf(settings.tools);
    if (settings.tool_choice !== "auto") body.tool_choice = settings.tool_choice;
  }
  if (settings.schema.trim()) body.response_format = formatOf(settings.schema);
  if (settings.stream === "no") return body;
  return { ...body, stream: true, stream_options: { include_usage: true } };
}

function parse(field, label, text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new SettingError(field, `${label}: this is not JSON: ${error.message}`);
  }
}

/** Tools are OpenAI's objects, or functions alone, or one of either. */
function toolsOf(text) {
  const value = parse("tools", "Tools", text);
  const list = Array.isArray(value) ? value : [value];
  return list.map((tool) =>
    tool && typeof tool === "object" && tool.name && !tool.function ? { type: "function", function: tool } : tool,
  );
}

/** A format is a JSON schema, or OpenAI's whole response_format. */
function formatOf(text) {
  const value = parse("schema", "JSON schema", text);
  if (!value || typeof value !== "object" || Array.isArray(value))
    throw new SettingError("schema", "JSON schema: enter a JSON object.");
  if (["text", "json_object", "json_schema"].includes(value.type)) return value;
  return { type: "json_schema", json_schema: { name: "answer", schema: value } };
}

/** Return the request as a curl command. The key is a placeholder in the environment. */
export function curlOf(body, origin, hasKeys) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = hasKeys ? ` \\\n  -H "authorization: Bearer $${KEY}"` : "";
  const buffer = body.stream ? "-N " : "";
  const type = ` \\\n  -H "content-type: application/json"`;
  return `curl ${buffer}${origin}/v1/chat/completions${type}${key} \\\n  -d '${json}'\n`;
}

/** Return the request as a Python program with OpenAI's client. */
export function pythonOf(body, origin, hasKeys) {
  const fields = Object.entries(body)
    .map(([name, value]) => `    ${name}=${pythonLiteral(value, 1)},\n`)
    .join("");
  const key = hasKeys ? `os.environ["${KEY}"]` : '"unused"';
  const imports = hasKeys ? "import os\n\n" : "";
  const print = body.stream ? STREAM_LOOP : "print(answer.choices[0].message)\n";
  return (
    `${imports}from openai import OpenAI\n\nclient = OpenAI(base_url="${origin}/v1", api_key=${key})\n` +
    `answer = client.chat.completions.create(\n${fields})\n${print}`
  );
}

function pythonLiteral(value, depth) {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value === "string") return JSON.stringify(value); // a JSON string is a Python string
  if (typeof value !== "object") return String(value);
  const isList = Array.isArray(value);
  const items = isList
    ? value.map((item) => pythonLiteral(item, depth + 1))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${pythonLiteral(item, depth + 1)}`);
  const [open, close] = isList ? "[]" : "{}";
  const line = `${open}${items.join(", ")}${close}`;
  if (line.length < 90 && !line.includes("\n")) return line;
  const indent = "    ".repeat(depth + 1);
  return `${open}\n${items.map((item) => `${indent}${item},\n`).join("")}${"    ".repeat(depth)}${close}`;
}
