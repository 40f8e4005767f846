// An agent of the Vercel AI SDK on a task; see task.py for the files. node ai_sdk.mjs TASK.json
import { appendFileSync, readFileSync } from 'node:fs';
import { isDeepStrictEqual } from 'node:util';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, jsonSchema, isStepCount, streamText, tool } from 'ai';

const task = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const record = (value) => appendFileSync(task.record, JSON.stringify(value) + '\n');

function call(name, given) {
  record({ name, arguments: given });
  const expected = task.results.find((one) => one.name === name && isDeepStrictEqual(one.arguments, given));
  return expected ? expected.result : 'error: no such call in the script';
}

const tools = Object.fromEntries(
  task.tools.map(({ name, description, parameters }) => [
    name,
    tool({ description, inputSchema: jsonSchema(parameters), execute: async (given) => call(name, given) }),
  ]),
);
const provider = createOpenAICompatible({ name: 'headrace', baseURL: task.base_url, apiKey: task.key });
const request = { model: provider(task.model), prompt: task.prompt, tools, stopWhen: isStepCount(100) };

if (task.stream) {
  const result = streamText({ ...request, onError: ({ error }) => { throw error; } });
  await result.consumeStream();
  record({ final: await result.text });
} else {
  record({ final: (await generateText(request)).text });
}
