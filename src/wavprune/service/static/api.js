// Requests to the service; a refusal is an error whose message is a sentence for people.

const ROOT = "/api/v1";
const session = { ask: null };

// Called where a token is needed; resolves when the browser has one.
export function onToken(ask) {
  session.ask = ask;
}

export async function request(path, { method = "GET", json } = {}) {
  const options = { method };
  if (json !== undefined) {
    options.headers = { "content-type": "application/json" };
    options.body = JSON.stringify(json);
  }
  let answer;
  try {
    answer = await fetch(ROOT + path, options);
  } catch {
    throw new Error("The service does not answer. Is it still running?");
  }
  if (answer.status === 401 && path !== "/session") {
    await session.ask();
    return request(path, { method, json });
  }
  if (answer.status === 204) return null;
  const body = await answer.json().catch(() => ({ detail: `status ${answer.status}` }));
  if (!answer.ok) throw Object.assign(new Error(body.detail), { status: answer.status });
  return body;
}

export function send(path, file, progress) {
  return new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    sending.open("POST", `${ROOT}${path}?name=${encodeURIComponent(file.name)}`);
    sending.setRequestHeader("content-type", "application/octet-stream");
    sending.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    sending.onerror = () => reject(new Error(`${file.name} could not be sent; the service ended the connection.`));
    sending.onload = () => {
      let body = {};
      try {
        body = JSON.parse(sending.responseText);
      } catch { /* what is no JSON is no answer of the service */ }
      if (sending.status === 201) resolve(body);
      else reject(new Error(body.detail ?? `status ${sending.status}`));
    };
    sending.send(file);
  });
}

// Calls back at each change until there are no more; returns a function that stops it.
export function follow(path, changed) {
  const events = new EventSource(ROOT + path);
  events.onmessage = (event) => {
    const state = JSON.parse(event.data);
    if (!["waiting", "queued", "running"].includes(state.state)) events.close();
    changed(state);
  };
  events.onerror = () => {
    // A service that was started again is asked by the list of jobs.
    if (events.readyState === EventSource.CLOSED) changed(null);
  };
  return () => events.close();
}

export const link = (path) => ROOT + path;
