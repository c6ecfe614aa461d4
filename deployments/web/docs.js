// The API page: /openapi.json, a section a route.

const node = (tag, className, text) => {
  const out = document.createElement(tag);
  if (className) out.className = className;
  if (text !== undefined) out.textContent = text;
  return out;
};

function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const parts = schema.anyOf || schema.oneOf;
  if (parts) return parts.map(typeOf).filter((name) => name !== "null").join(" | ");
  if (schema.type === "array") return (schema.items && Object.keys(schema.items).length ? typeOf(schema.items) : "any") + "[]";
  return schema.type || "any";
}

function fields(schema) {
  const table = node("table");
  const titles = node("tr");
  titles.append(...["field", "type", "default", ""].map((title) => node("th", "", title)));
  table.append(titles);
  const needs = (name) => (schema.required || []).includes(name);
  const entries = Object.entries(schema.properties || {});
  for (const [name, field] of entries.sort(([a], [b]) => needs(b) - needs(a))) {
    const row = node("tr");
    const fallback = field.default === undefined || field.default === null ? "" : JSON.stringify(field.default);
    row.append(node("td", "", name), node("td", "", typeOf(field)), node("td", "", needs(name) ? "required" : fallback));
    row.append(node("td", "", field.description || ""));
    table.append(row);
  }
  const box = node("div", "scroll");
  box.append(table);
  return box;
}

async function main() {
  const response = await fetch("openapi.json");
  const api = await response.json();
  document.getElementById("version").textContent = "version " + api.info.version;
  const found = (schema) => (schema.$ref ? api.components.schemas[schema.$ref.split("/").at(-1)] : schema);
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const section = node("details", "panel route");
      const head = node("summary");
      head.append(node("b", "method", method.toUpperCase()), node("b", "", path), " ", node("small", "", operation.summary));
      section.append(head);
      const body = operation.requestBody?.content["application/json"].schema;
      if (body) section.append(fields(found(body)));
      for (const [status, answer] of Object.entries(operation.responses)) {
        section.append(node("p", "answer", status + "  " + answer.description));
      }
      document.getElementById("routes").append(section);
    }
  }
}

main();
