"""What people read: tables for a terminal and for Markdown, charts as SVG, and one page of HTML."""
