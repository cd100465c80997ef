// The jobs of the model that is shown, also those that another tab began.

import { follow, link, request } from "./api.js";
import { bytes, count, element, find, percent, replaceRows, show } from "./page.js";

const SECONDS = 3;
const OPEN = ["queued", "running"];

const shown = { model: null, inputs: null, jobs: new Map(), following: new Map(), timer: null };

export const jobs = {
  // inputs: says how images become inputs.
  start(model, inputs) {
    shown.model = model;
    shown.inputs = inputs;
    shown.timer = setInterval(() => document.hidden || list().catch(() => {}), 1000 * SECONDS);
    list().catch((error) => show(error.message));
  },
  stop() {
    clearInterval(shown.timer);
    for (const end of shown.following.values()) end();
    shown.following.clear();
    shown.jobs.clear();
    shown.model = null;
    render();
  },
  async add(settings) {
    const job = await request(`/models/${shown.model.id}/jobs`, { method: "POST", json: settings });
    take(job);
    find("#work").scrollIntoView({ block: "nearest" });
  },
};

async function list() {
  const model = shown.model;
  const found = await request(`/models/${model.id}/jobs`);
  if (model !== shown.model) return;
  for (const job of found.reverse()) take(job);
}

function take(job) {
  shown.jobs.set(job.id, job);
  if (OPEN.includes(job.state) && !shown.following.has(job.id)) {
    shown.following.set(job.id, follow(`/jobs/${job.id}/events`, (now) => {
      if (now === null) shown.following.delete(job.id);
      else if (shown.jobs.has(now.id)) {
        shown.jobs.set(now.id, now);
        render();
      }
    }));
  }
  render();
}

function render() {
  const all = [...shown.jobs.values()].sort((a, b) => b.created - a.created);
  find("#work").hidden = !all.length;
  const rows = find("#jobs");
  const kept = new Map([...rows.children].map((row) => [row.dataset.key, row]));
  replaceRows(rows, all.map((job) => {
    const text = JSON.stringify(job);
    const old = kept.get(job.id);
    if (old?.dataset.text === text) return old;
    const row = element("li", {}, ...parts(job));
    row.dataset.key = job.id;
    row.dataset.text = text;
    row.dataset.state = job.state;
    return row;
  }));
}

// What a job is, without a capital: "prune 80.0% in dct".
function title({ kind, settings }) {
  if (kind === "compare") {
    const other = shown.jobs.get(settings.job);
    return `compared with the original: ${other ? title(other) : "a result"}`;
  }
  return `${kind} ${settings.target_bytes ? `to ${bytes(settings.target_bytes)}` : `${percent(settings.sparsity, 1)} in ${settings.basis}`}`;
}

function parts(job) {
  const { result } = job;
  const name = title(job);
  const found = [element("strong", {}, `${name[0].toUpperCase()}${name.slice(1)}`)];
  const end = element("span", { class: "end" });
  if (OPEN.includes(job.state)) {
    const bar = element("progress", { "aria-label": job.kind });
    if (job.share !== null) bar.value = job.share;
    const cancel = element("button", { type: "button" }, "Cancel");
    cancel.onclick = () => request(`/jobs/${job.id}`, { method: "DELETE" }).then(take, (error) => show(error.message));
    end.append(cancel);
    found.push(bar, element("span", { class: "soft" }, job.state === "queued" ? "waits for its turn" : job.stage));
  } else if (job.state === "done") {
    const facts = [];
    if (result.bytes !== null) facts.push(bytes(result.bytes));
    if (result.kept !== null) facts.push(`${count(result.kept)} values kept`);
    if (result.error !== null) facts.push(`error ${percent(result.error, 2)}`);
    if (result.agreement !== null) facts.push(`agrees on ${percent(result.agreement, 1)} of ${count(result.inputs)} inputs`);
    if (result.kl !== null) facts.push(`divergence ${+result.kl.toPrecision(3)}`);
    else if (result.output_error !== null) facts.push(`outputs of ${count(result.inputs)} inputs change by ${percent(result.output_error, 2)}`);
    found.push(element("span", {}, facts.join(", ")), element("span", { class: "soft" }, `${result.seconds.toFixed(1)} s`));
    if (result.file !== null && shown.model?.runs) {
      const compare = element("button", { type: "button" }, "Compare with the original");
      compare.onclick = () => jobs.add({ kind: "compare", job: job.id, ...shown.inputs() }).then(() => show(null), (error) => show(error.message));
      end.append(compare);
    }
    if (result.file !== null) {
      end.append(
        element("a", { href: link(`/jobs/${job.id}/model`), download: "" }, "Download the model"),
        element("a", { href: link(`/jobs/${job.id}/report`), download: "" }, "Report"),
      );
    }
  } else {
    found.push(element("span", { class: job.state }, job.error ?? job.state));
  }
  found.push(end);
  return found;
}
