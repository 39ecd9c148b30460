// Requests to the server: the list of models, and answers as a stream of server-sent events.

const KEY = "llama_jax.key"; // sessionStorage alone: gone when the tab is closed

export const setKey = (key) => sessionStorage.setItem(KEY, key);
export const hasKey = () => Boolean(sessionStorage.getItem(KEY));

/** What went wrong, in plain words. `status` is that of HTTP, 0 if there was no response. */
export class ServerError extends Error {
  constructor(message, status, code, wait) {
    super(message);
    Object.assign(this, { status, code, wait });
  }
}

async function request(url, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(url, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. It may have stopped, or the network is down.", 0);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const { message = response.statusText, code } = body.error ?? {};
  throw new ServerError(explain(response.status, code, message), response.status, code,
    Math.max(1, Math.ceil(Number(response.headers.get("Retry-After"))) || 5));
}

function explain(status, code, message) {
  if (status === 401) {
    return hasKey() ? "The server does not accept this API key." : "This server needs an API key.";
  }
  if (code === "context_length_exceeded") {
    return "The conversation no longer fits into the model's context. Start a new one, or delete or "
      + `shorten earlier messages. (${message})`;
  }
  if (status === 429) return "The server is busy: too many requests are waiting.";
  if (status === 503) return `The server takes no requests now. It may be starting or stopping. (${message})`;
  return `The server refused the request (${status}): ${message}`;
}

/** Names of the models and adapters that the server offers. */
export async function models() {
  const response = await request("v1/models");
  return (await response.json()).data.map((model) => model.id);
}

/** The chunks of a chat completion. */
export async function* chat(body, signal) {
  const streamed = JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } });
  const response = await request("v1/chat/completions", { method: "POST", body: streamed, signal });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(`The server stopped: ${chunk.error.message}`, 200, chunk.error.code);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
  }
  throw new ServerError("The connection ended before the answer was complete.", 0);
}

/** The data of each server-sent event. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }
}
