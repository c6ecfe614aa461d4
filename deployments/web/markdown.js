// The little Markdown that models write, as DOM nodes: never as HTML, so that no answer can inject any.

const INLINE = /(`[^`\n]+`|\*\*[^*\n]+\*\*|\*[^*\s][^*\n]*\*|\[[^\]\n]+\]\(https?:[^)\s]+\))/;

function inline(parent, text) {
  for (const piece of text.split(INLINE)) {
    if (!piece) continue;
    let node;
    const link = piece.match(/^\[([^\]]+)\]\((https?:[^)\s]+)\)$/);
    if (piece.length > 2 && piece.startsWith("`") && piece.endsWith("`")) {
      node = document.createElement("code");
      node.textContent = piece.slice(1, -1);
    } else if (piece.length > 4 && piece.startsWith("**") && piece.endsWith("**")) {
      node = document.createElement("strong");
      node.textContent = piece.slice(2, -2);
    } else if (link) {
      node = document.createElement("a");
      node.textContent = link[1];
      node.href = link[2];
      node.rel = "noopener noreferrer";
      node.target = "_blank";
    } else if (piece.length > 2 && INLINE.test(piece) && piece.startsWith("*") && piece.endsWith("*")) {
      node = document.createElement("em");
      node.textContent = piece.slice(1, -1);
    } else {
      node = document.createTextNode(piece);
    }
    parent.append(node);
  }
}

function block(lines) {
  const heading = lines[0].match(/^(#{1,4})\s+(.*)$/);
  if (heading && lines.length === 1) {
    const node = document.createElement("h" + (heading[1].length + 2));
    inline(node, heading[2]);
    return node;
  }
  const bullet = /^\s*(?:[-*•]|(\d+)[.)])\s+/;
  if (lines.every((line) => bullet.test(line))) {
    const first = lines[0].match(bullet)[1];
    const list = document.createElement(first ? "ol" : "ul");
    if (first) list.start = Number(first);
    for (const line of lines) {
      const item = document.createElement("li");
      inline(item, line.replace(bullet, ""));
      list.append(item);
    }
    return list;
  }
  const paragraph = document.createElement("p");
  inline(paragraph, lines.join("\n"));
  return paragraph;
}

/** Replace what is in `target` by `text`, rendered. An open code fence counts as closed at the end. */
export function render(target, text) {
  const nodes = [];
  let lines = [];
  let fence = null;
  const flush = () => {
    if (lines.length) nodes.push(block(lines));
    lines = [];
  };
  for (const line of text.split("\n")) {
    if (/^\s*```/.test(line)) {
      if (fence) {
        fence = null;
      } else {
        flush();
        const pre = document.createElement("pre");
        fence = document.createElement("code");
        pre.append(fence);
        nodes.push(pre);
      }
    } else if (fence) {
      fence.textContent += line + "\n";
    } else if (!line.trim()) {
      flush();
    } else {
      lines.push(line);
    }
  }
  flush();
  target.replaceChildren(...nodes);
}
